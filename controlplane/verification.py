"""Verifying an evidence log offline: its links, its root against a checkpoint, and its rules.

No I/O and no private key: lines and a verified checkpoint come in, a verdict goes out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.audit import Auditor
from controlplane.audit_rules import Counts, Finding
from controlplane.checkpoint import Checkpoint
from controlplane.entries import UTC_CLOCK, Chain, EntryError

LINK = "link"  # an entry is damaged, missing, out of place, or not linked to the one before
CHECKPOINT = "checkpoint"  # the log is not the one that was signed


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `index` is the entry's place in the file, from 0."""

    index: int | None  # None: of the log as a whole
    rule: str  # LINK, CHECKPOINT or a value of `audit_rules.Rule`
    detail: str

    def __str__(self) -> str:
        where = "log" if self.index is None else f"entry {self.index}"
        return f"{where}: {self.rule}: {self.detail}"


@dataclass(slots=True)
class Verdict:
    """What was checked, and what is wrong."""

    size: int = 0  # entries in the file
    root: bytes = b""  # over all of them
    audited: int = 0  # entries up to the first damage, whose rules were checked
    counts: Counts = field(default_factory=Counts)  # of these
    problems: list[Problem] = field(default_factory=list)


def verify_log(lines: Iterable[bytes], checkpoint: Checkpoint | None) -> Verdict:
    """Check a log, line by line with their ends, against a checkpoint whose signature is good.

    Behind a damaged entry the links are checked on, the rules are not: they need all that was
    before.
    """
    chain, auditor, verdict = Chain(UTC_CLOCK), Auditor(), Verdict()
    for index, line in enumerate(lines):
        content = line.removesuffix(b"\n")
        try:
            entry = chain.check(content)
        except EntryError as error:
            verdict.problems.append(Problem(index, LINK, str(error)))
            chain.skip(content, error.index)
        else:
            if not line.endswith(b"\n"):
                verdict.problems.append(Problem(index, LINK, "is not ended by a new line"))
            if verdict.audited == index:
                found = auditor.add(entry)
                verdict.problems += [_problem(finding) for finding in found]
                verdict.audited += 1
    verdict.size, verdict.root = chain.tree.size, chain.tree.root()
    if verdict.audited == verdict.size:
        verdict.problems += [_problem(finding) for finding in auditor.finish()]
    verdict.counts = auditor.counts
    verdict.problems.sort(key=lambda problem: problem.index or 0)
    if checkpoint is None:
        pass
    elif checkpoint.size > verdict.size:
        missing = f"entries {verdict.size} to {checkpoint.size - 1} are missing"
        detail = f"signed for {checkpoint.size} entries, the log has {verdict.size}: {missing}"
        verdict.problems.append(Problem(None, CHECKPOINT, detail))
    elif chain.tree.root(checkpoint.size) != checkpoint.root:
        detail = f"the root of the first {checkpoint.size} entries is not the signed one"
        verdict.problems.append(Problem(None, CHECKPOINT, detail))
    return verdict


def _problem(finding: Finding) -> Problem:
    return Problem(finding.index, finding.rule.value, finding.detail)
