"""`transformerlm-download`: files of the Hugging Face Hub, for a recipe or by name."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.download")

from collections.abc import Callable, Sequence

from cli.progress import Progress
from cli.terminal import note
from cli.utils import Command
from cli.utils import main as run_command
from config.download import DownloadConfig
from config.schemas import duration_seconds

# What --help shows.
SHORT = ("recipe", "repo", "files", "repo_type", "revision", "output_dir", "overwrite")
EXAMPLES = (
    ("the text of a recipe", "--config download"),
    ("a file by its name", "--repo roneneldan/TinyStories --files TinyStoriesV2-GPT4-valid.txt --output_dir data"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-download", DownloadConfig, download, short=SHORT, examples=EXAMPLES), argv)


def download(config: DownloadConfig) -> None:
    """Download each file, and report each: as a line of JSON on stdout, unless that is a terminal."""
    from databuilder.download import RECIPES, Download
    from databuilder.hub import Hub, HubFile
    from logger import create_logger

    if config.recipe is not None:
        files = RECIPES[config.recipe]
    else:
        assert config.repo is not None
        files = tuple(HubFile(config.repo, path, config.repo_type, config.revision) for path in config.files)
    hub = Hub.from_environment(timeout=duration_seconds(config.timeout))
    logger = create_logger("console", run_name="download")
    for number, file in enumerate(files):
        report = Download(
            file,
            config.output_dir / file.path,
            sha256=config.sha256[number] if config.sha256 else None,
            overwrite=config.overwrite,
            retries=config.retries,
            progress=_progress(),
        ).run(hub)
        fetched = "downloaded" if report.fetched else "there already"
        note(f"{report.path}: {report.bytes / 1e6:,.1f} MB, {fetched}, checked by {report.checked}")
        logger.log_event(
            "downloaded",
            path=str(report.path),
            bytes=report.bytes,
            fetched=report.fetched,
            checked=report.checked,
            url=file.url(hub.endpoint),
        )


def _progress() -> Callable[[int, int], None]:
    """Return a progress callback that starts at the bytes that are already here."""
    shown: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(total, start=done, unit="B"))
        shown[0](done)

    return show
