"""Known vulnerabilities of the packages in requirements.lock, by pip-audit and OSV (https://osv.dev).

A known one fails, unless pyproject.toml accepts it under `tool.audit.accepted`, with a reason. Where OSV
cannot be asked, nothing is known: that is said, and does not fail. OSV_URL names another service of its kind.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

LOCK = Path("requirements.lock")
OSV_URL = "https://api.osv.dev/v1/query"
TIMEOUT = 10  # seconds that one answer may take
LONGEST = 180  # seconds that all may
UNREACHABLE = r"requests\.exceptions\.\w+|ServiceError|ConnectionError|Could not connect|JSONDecodeError"


def audit(url: str, accepted: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Asks about every package; JSON on stdout, or, if the service fails, an error on stderr alone."""
    command = [sys.executable, "-m", "pip_audit", f"--requirement={LOCK}", "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service=osv", f"--osv-url={url}", f"--timeout={TIMEOUT}"]
    command += ["--format=json", "--progress-spinner=off", *(f"--ignore-vuln={id_}" for id_ in accepted)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)


def findings(report: dict[str, Any]) -> list[str]:
    """Return a line per vulnerability: package, identifier, and the versions without it."""
    return [
        f"{package['name']} {package['version']}: {vulnerability['id']}, "
        f"mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in report["dependencies"]
        for vulnerability in package.get("vulns", [])
    ]


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    accepted = project["tool"]["audit"]["accepted"]
    url = os.environ.get("OSV_URL", OSV_URL)
    try:
        result = audit(url, accepted)
    except subprocess.TimeoutExpired:
        print(f"audit: NOTHING IS KNOWN of {LOCK}'s packages: {url} took more than {LONGEST} s")
        return
    if result.returncode and not result.stdout.strip():
        if not re.search(UNREACHABLE, result.stderr):
            sys.exit(f"{result.stderr}audit: pip-audit failed")
        print(f"audit: NOTHING IS KNOWN of {LOCK}'s packages: {url} cannot be asked")
        return
    report = json.loads(result.stdout)
    if found := findings(report):
        remedy = "`make lock`, or accept with a reason under tool.audit.accepted in pyproject.toml"
        sys.exit("\n".join([*found, f"audit: {len(found)} known vulnerabilities: {remedy}"]))
    print(
        f"audit: no known vulnerability in {len(report['dependencies'])} packages, {len(accepted)} accepted"
    )


if __name__ == "__main__":
    main()
