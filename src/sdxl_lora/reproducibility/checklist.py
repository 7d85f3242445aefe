"""A list of checks: the name, status, detail and remedy of each, as text or JSON."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

_CheckStatus = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: _CheckStatus
    """`warn`: it works but should be different, or was not checked; `fail`: it must be fixed."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do; empty if nothing."""


def passed(name: str, detail: str) -> Check:
    """Return a check that passed."""
    return Check(name, "pass", detail)


def warned(name: str, detail: str, remedy: str) -> Check:
    """Return a check with a warning."""
    return Check(name, "warn", detail, remedy)


def failed(name: str, detail: str, remedy: str) -> Check:
    """Return a check that failed."""
    return Check(name, "fail", detail, remedy)


def format_check(check: Check, width: int) -> str:
    """Return a check as text, its name padded to `width`, the remedy on a second line."""
    text = f"{check.status}  {check.name:{width}}  {check.detail}"
    return f"{text}\n{'':{width + 8}}-> {check.remedy}" if check.remedy else text


def summarize_checks(checks: Sequence[Check]) -> str:
    """Return the number of checks of each status as one line."""
    counts = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail")}
    return f"{counts['pass']} passed, {counts['warn']} warned, {counts['fail']} failed"


def checks_as_json(checks: Iterable[Check]) -> str:
    """Return the checks as a JSON list of objects."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def exit_status(checks: Iterable[Check]) -> int:
    """Return the status for a script: 1 if a check failed, 0 with at most warnings."""
    return int(any(check.status == "fail" for check in checks))
