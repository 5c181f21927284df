"""``kbitcheck adapter``."""

from dataclasses import dataclass
from pathlib import Path

from kbitcheck.cli.options import JudgeOptions, argument, option, split_codes
from kbitcheck.cli.show_report import show_report
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run import saved_adapter


@dataclass(frozen=True, kw_only=True)
class Options(JudgeOptions):
    directory: str = argument("DIR", "The directory that save_pretrained wrote, with adapter_config.json.")
    base: str = option(
        "The base to compare with; default: the one it names, if it is on this machine.", "", metavar="MODEL"
    )
    quant: str = option(
        "How the base is quantized where the adapter is merged into it; default: as it is already, else nf4.",
        "",
        metavar="Q",
    )
    trust_remote_code: bool = option("Run the base's own code.", False)


def run(options: Options) -> int:
    """Judge a saved adapter; returns the exit code."""
    output = OutputFile(options.output)
    report = saved_adapter.judge(
        Path(options.directory).expanduser(),
        base=options.base,
        quant=options.quant,
        select_codes=split_codes(options.select),
        ignore=options.ignored,
        strict=options.strict,
        trust_remote_code=options.trust_remote_code,
    )
    show_report(report, options, output, says_verdict=False)
    return report.exit_code
