"""Reports that an earlier run saved as JSON."""

import json
from pathlib import Path

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.suggest import did_you_mean


def read_report(name: str) -> Report:
    """The report in a file."""
    try:
        return Report.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        beside = [] if Path(name).exists() else [str(path) for path in Path(name).parent.glob("*.json")]
        raise UsageError(f"cannot read {name}: {error.strerror}{did_you_mean(name, beside)}") from error
    except (UsageError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{name} is not a kbitcheck report: {str(error).splitlines()[0]}") from error
