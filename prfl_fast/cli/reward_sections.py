"""Sections of the YAML files that name reward models."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self  # noqa: UP035 - Python 3.10 has none

from prfl_fast.cli.yaml_config import (
    Count,
    NonNegative,
    Positive,
    Section,
    Text,
    from_list,
    key,
)
from prfl_fast.rewards.functions import EnsembleMode
from prfl_fast.utils.checks import check


class ReferenceReward(Section):
    """A reward model in the files of HY-Video-PRFL."""

    transformer: Text = key(..., "Folder of the transformer.")
    mlp: Text = key(..., "File of the MLP head.")
    pool: Text = key(..., "File of the attention pooling.")
    num_heads: Count = key(8, "Heads of the attention pooling.")
    return_type: Literal["query", "attention"] | None = key(
        None,
        "Result of its pooling: with the query added, as in all published configurations, or the "
        "attention alone; null reads it from the transformer's config.json.",
    )


class NamedReward(Section):
    """One of several rewards; the weighted sum of their losses trains."""

    name: Text = key(..., "Name of its scores in the log.")
    path: Text | ReferenceReward | Annotated[tuple[Text, ...], Field(min_length=2), from_list] = (
        key(..., "Folder of a saved reward model, or a list of folders: an ensemble.")
    )
    weight: Positive = key(1.0, "Factor of its loss.")
    ensemble: EnsembleMode | None = key(
        None, "Combination of the scores; required for a list of folders."
    )
    coefficient: NonNegative | None = key(
        None, "Factor of the penalty with ensemble: uncertainty; null is 0.1."
    )

    @model_validator(mode="after")
    def _check_ensemble(self) -> Self:
        several = isinstance(self.path, tuple)
        modes = "mean, worst or uncertainty for a list of paths"
        ok = several == (self.ensemble is not None)
        check(ok, "ensemble", self.ensemble, modes if several else "no value for a single path")
        ok = self.coefficient is None or self.ensemble == "uncertainty"
        check(ok, "coefficient", self.coefficient, "no value without ensemble: uncertainty")
        return self

    @property
    def paths(self) -> tuple[str | ReferenceReward, ...]:
        """Return the sources of the reward's models, several of an ensemble."""
        return self.path if isinstance(self.path, tuple) else (self.path,)
