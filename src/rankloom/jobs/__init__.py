"""What the commands do: train, judge, plan, merge, quantise, describe, talk. No command line in it."""
