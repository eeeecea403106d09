"""What can be done with a finished run, as commands that work when they are pasted."""

from __future__ import annotations

from shlex import quote

from rankloom.jobs.plan import merges
from rankloom.jobs.runs import Trained


def next_commands(trained: Trained) -> tuple[str, ...]:
    """Judge the run again, ask it what it was asked, and, where its change has a matrix, merge it."""
    found = trained.result
    run = quote(str(found.out))
    commands = [f"rankloom eval {run}"]
    if found.answers:
        commands.append(f"rankloom generate {run} -p {quote(found.answers[0][1].prompt)}")
        commands.append(f"rankloom chat {run}")
    bank = trained.loaded.model.rankloom
    if merges(bank.sites(bank.names[-1])[:1])[0]:  # those of a run are all of one method
        commands.append(f"rankloom merge {run} {quote(f'{found.out}-merged')}")
    return tuple(commands)
