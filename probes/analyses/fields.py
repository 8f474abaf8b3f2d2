"""Options that several analyses have; each extends one of these dataclasses."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from llava_bidir.common.cli import Count
from llava_bidir.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of an analysis of a run.

    Args:
        probes: Folder of a finished probe run.
        out: Output folder (default: the run's folder).
        overwrite: Replace a result that other options or runs have made.
        trust: Run the file of a run whose model is FILE.py:FUNCTION; read it first.
    """

    probes: Path
    out: Path | None = None
    overwrite: bool = False
    trust: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return self.out or self.probes

    @property
    def settings(self) -> dict[str, Any]:
        """Options that a result depends on, beside the run."""
        settings = asdict(self)
        for name in ("probes", "out", "overwrite", "trust"):
            del settings[name]
        return settings


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(RunOptions):
    """Options of an analysis that asks questions about places.

    Args:
        questions: LLaVA's JSON with regions (default: questions.json beside the data set's folder, as demo-assets
            writes it).
        images: Folder of the images (default: that of the questions).
        limit: Number of questions to ask (default: all).
    """

    questions: Path | None = None
    images: Path | None = None
    limit: Count | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Options that a result depends on, beside the run and the questions."""
        settings = super().settings
        for name in ("questions", "images"):
            del settings[name]
        return settings

    def located(self, root: str | Path) -> Self:
        """Return the options with both paths, by default beside the folder of the data set, `root`.

        Raises:
            UserError: There are no questions.
        """
        questions = self.questions or Path(root).parent / "questions.json"
        if not questions.is_file():
            raise UserError(
                f"{questions} is not a file; expected questions with regions (--questions FILE.json)"
            )
        return replace(self, questions=questions, images=self.images or questions.parent)
