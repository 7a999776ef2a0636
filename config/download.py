"""Schema of `transformerlm-download`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from config.schemas import Duration, FilePath, Section

Recipe = Literal["tinystories", "openwebtext_sample"]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
Repo = Annotated[
    str, Field(pattern=rf"^({_NAME}/)?{_NAME}$", json_schema_extra={"takes": "a repository such as owner/name"})
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", json_schema_extra={"takes": "64 hexadecimal digits, 0-9 a-f"})]


def _check_path(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or not path.isprintable():
        raise ValueError(f"expected a file's path in the repository, such as data/train.txt, found {path[:80]!r}")
    return path


class DownloadConfig(Section):
    """Download text from the Hugging Face Hub: resumable, checked, and skipped if the file is already there."""

    recipe: Recipe | None = Field(
        None, description="download the files of a recipe in docs/recipes.md; or give repo and files"
    )
    repo: Repo | None = Field(None, description="repository on the Hub, such as roneneldan/TinyStories")
    repo_type: Literal["dataset", "model"] = Field("dataset", description="kind of the repository")
    revision: str = Field(
        "main",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
        description="branch, tag or commit of the repository",
        json_schema_extra={"takes": "a name of letters, digits and . _ / -"},
    )
    files: list[Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_check_path)]] = Field(
        [], max_length=1000, description="files of repo, by their paths in it"
    )
    sha256: list[Sha256] = Field(
        [], max_length=1000, description="checksums, one for each file; none: those that the Hub gives"
    )
    output_dir: FilePath = Field(description="directory for the files; each keeps its path in the repository below it")
    overwrite: bool = Field(False, description="replace existing files that differ")
    retries: int = Field(5, ge=0, le=100, description="failures in a row without progress before giving up")
    timeout: Duration = Field("30s", description="longest silence of the server before a retry")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.recipe is not None and (self.repo is not None or self.files):
            raise ValueError("expected recipe, or repo and files, found both")
        if self.recipe is None and (self.repo is None or not self.files):
            raise ValueError("expected recipe, or repo and files, found neither whole")
        if self.recipe is not None and self.revision != "main":
            raise ValueError("revision is for repo, found it with recipe")
        if self.recipe is not None and self.repo_type != "dataset":
            raise ValueError("repo_type is for repo, found it with recipe")
        if self.sha256 and len(self.sha256) != len(self.files):
            raise ValueError(f"sha256 needs one for each of files ({len(self.files)}), found {len(self.sha256)}")
        if len(set(self.files)) != len(self.files):
            raise ValueError("files holds a file twice")
        return self
