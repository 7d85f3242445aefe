"""A checklist: what was looked at, how it stands, and what to do about it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

_CheckStatus = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the list."""

    name: str
    status: _CheckStatus
    """`warn`: not as it should be, or it could not be looked at; `fail`: it cannot stay so."""
    detail: str
    remedy: str = ""
    """What to do, if there is something to do."""


def passed(name: str, detail: str) -> Check:
    return Check(name, "pass", detail)


def warned(name: str, detail: str, remedy: str) -> Check:
    return Check(name, "warn", detail, remedy)


def failed(name: str, detail: str, remedy: str) -> Check:
    return Check(name, "fail", detail, remedy)


def format_check(check: Check, width: int) -> str:
    """A check as text, its name padded to `width`; the remedy below it."""
    text = f"{check.status}  {check.name:{width}}  {check.detail}"
    return f"{text}\n{'':{width + 8}}-> {check.remedy}" if check.remedy else text


def summarize_checks(checks: Sequence[Check]) -> str:
    """How many are how, in a line."""
    counts = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail")}
    return f"{counts['pass']} passed, {counts['warn']} warned, {counts['fail']} failed"


def checks_as_json(checks: Iterable[Check]) -> str:
    return json.dumps([asdict(check) for check in checks], indent=2)


def exit_status(checks: Iterable[Check]) -> int:
    """1 if a check failed, else 0; a warning stops no script."""
    return int(any(check.status == "fail" for check in checks))
