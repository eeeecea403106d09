"""What can be done with a finished run, as commands that work when they are pasted."""

from __future__ import annotations

from shlex import quote

from rankloom.errors import NotMergeable
from rankloom.jobs.runs import Trained


def next_commands(trained: Trained) -> tuple[str, ...]:
    """Judge the run again, ask it what it was asked, and, where its change has a matrix, merge it."""
    found = trained.result
    run = quote(str(found.out))
    commands = [f"rankloom eval {run}"]
    if found.answers:
        commands.append(f"rankloom generate {run} -p {quote(found.answers[0][1].prompt)}")
        commands.append(f"rankloom chat {run}")
    if _mergeable(trained):
        commands.append(f"rankloom merge {run} {quote(f'{found.out}-merged')}")
    return tuple(commands)


def _mergeable(trained: Trained) -> bool:
    """Whether the change of the first site has a matrix; those of a run are all of one method."""
    bank = trained.loaded.model.rankloom
    site = next(iter(bank.sites(bank.names[-1])))
    try:
        site.adapter.delta(site.base)
    except NotMergeable:
        return False
    return True
