"""The mechanism: sites, kinds, adapters, methods, rules, the bank. Knows no method and no model library."""
