"""Sections of the YAML files that configure evaluations."""

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self  # noqa: UP035 - Python 3.10 has none

from prfl_fast.cli.yaml_config import Count, Index, Number, Section, Text, from_list, key
from prfl_fast.utils.checks import check
from prfl_fast.utils.choices import EVALUATION_TIMESTEPS

Timesteps = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(min_length=1), from_list
]


class EvalSection(Section):
    """Evaluation of the generator: samples of held-out prompts and their rewards.

    The log has the mean of each reward at the end of the sampler as eval/NAME, and at timesteps t
    along it as eval/NAME/t. Step 0 is the generator before the training.
    """

    prompts: Text = key(
        ..., "Folder of a dataset whose conditions and sizes are sampled; its latents are not used."
    )
    every: Count = key(100, "Optimizer steps between evaluations.")
    seeds: Annotated[tuple[Index, ...], Field(min_length=1), from_list] = key(
        (0,), "Seeds of the noise; each prompt is sampled with each of them."
    )
    codec: Text | None = key(
        None,
        "Pipeline or autoencoder that decodes the samples: frames go to samples/ and TensorBoard; "
        "null decodes none.",
    )


class RewardEvalSection(Section):
    """Evaluation on held-out samples, which do not train: in the run, and at its end.

    The log has accuracy and loss by timestep as eval/…, evaluation.json those of the saved reward
    model. Either data or held_out is required.
    """

    data: Text | None = key(None, "Folder of a dataset of labeled videos, or pairs.")
    held_out: Annotated[Number, Field(gt=0, lt=1)] | None = key(
        None, "Share of the dataset of the run that is held out, chosen by the samples' ids."
    )
    every: Count | None = key(100, "Optimizer steps between evaluations; null: at the end only.")
    patience: Count | None = key(
        None,
        "Evaluations in a row without a higher mean accuracy that end the run; the reward model of "
        "the best one is saved. null trains to the end.",
    )
    timesteps: Timesteps = key(EVALUATION_TIMESTEPS, "Timesteps of the evaluation.")
    batch_size: Count = key(1, "Videos, or pairs, in a forward pass.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        one = (self.data is None) != (self.held_out is None)
        check(one, "held_out", self.held_out, "a share if there is no data, else none")
        ok = self.patience is None or self.every is not None
        check(ok, "patience", self.patience, "no value with every: null")
        return self
