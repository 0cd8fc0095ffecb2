"""The report's axes: the order of cells, and the points of the sweep that the report leads with."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.axes import Cell, budget_order, family
from pipeline.config.schema import Config
from pipeline.store.rows import PromptRow

PromptRows = dict[str, PromptRow]  # one cell's rows by prompt_id
Cells = dict[Cell, PromptRows]


@dataclass(frozen=True)
class Axes:
    """What the config says about the sweep's axes: their order, and the points that the report leads with."""

    drafters: tuple[str, ...]
    datasets: tuple[str, ...]
    contexts: dict[str, int]  # name → prompt tokens
    gamma: int  # the γ of figures and findings that show one, swept at every context
    smallest_budget: int | None  # above 0; None where only the full cache is swept
    trained_without_prefix: tuple[str, ...]  # drafters that saw B = 0 in training
    max_new_tokens: int
    least_documents: int  # with fewer, the report gives figures but no verdicts

    @staticmethod
    def of(config: Config) -> Axes:
        wanted = config.train.validation_gamma
        everywhere = [
            gamma
            for gamma in config.sweep.gammas
            if all(gamma in config.sweep.gammas_of(context.name) for context in config.data.contexts)
        ]
        return Axes(
            drafters=(*(v.name for v in config.train.drafters), *config.sweep.baselines),
            datasets=tuple(s.name for s in config.data.sources if "test" in s.use),
            contexts={c.name: c.tokens for c in config.data.contexts},
            gamma=min(everywhere, key=lambda gamma: (abs(gamma - wanted), gamma)),
            smallest_budget=min((b for b in config.sweep.budgets if b != "full" and b > 0), default=None),
            trained_without_prefix=tuple(v.name for v in config.train.drafters if 0 in v.budgets),
            max_new_tokens=config.data.max_new_tokens,
            least_documents=config.report.least_documents,
        )

    def order(self, cell: Cell) -> tuple[float | str, ...]:
        """Sort key: data set, context, policy and drafter as the config lists them, budgets ascending."""
        return (
            self.datasets.index(cell.dataset), self.contexts[cell.context], cell.context, cell.policy,
            self.drafter_order(cell.drafter), cell.temperature, cell.seed, cell.control or "",
            budget_order(cell.budget), cell.gamma, cell.threshold, cell.lossy,
        )  # fmt: skip

    def drafter_order(self, name: str) -> int:
        """The index of a drafter in the config's list, or of a family's first drafter."""
        return next(i for i, drafter in enumerate(self.drafters) if name in (drafter, family(drafter)))

    def too_few(self, documents: int) -> str:
        """Why nothing is ranked over so few documents; "" where they are enough."""
        if documents >= self.least_documents:
            return ""
        return f"too few documents to rank ({documents} of at least {self.least_documents})"
