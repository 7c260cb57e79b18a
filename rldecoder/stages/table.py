"""The stages, in the order in which they run: the pipeline's graph in one view.

What a stage reads stands in the types of `rldecoder.stages.inputs`, what it publishes in the
catalogue. Its room, `rldecoder/stages/<name>.py`, has its function `run`, which is imported when
the stage is built: to plan, to show a status or to reuse what is published takes no torch.
"""

from __future__ import annotations

from rldecoder.artifacts import catalogue
from rldecoder.errors import BadInputError
from rldecoder.stages import fingerprints, inputs
from rldecoder.stages.context import Stage

# Raise a stage's version whenever the same config would now give another result.
STAGES: tuple[Stage, ...] = (
    Stage(catalogue.ModelFolder, 1, inputs.Nothing, "prepare", fingerprints.sync_tokenizer),
    Stage(catalogue.Corpus, 2, inputs.IngestInputs, "prepare", fingerprints.ingest),
    Stage(catalogue.Baselines, 4, inputs.TextInputs, "prepare"),
    Stage(catalogue.Sweep, 3, inputs.TextInputs, "prepare"),
    Stage(catalogue.Frontier, 2, inputs.FrontierInputs, "prepare"),
    Stage(catalogue.ActivationCache, 2, inputs.TextInputs, "features"),
    Stage(catalogue.TrainedSae, 4, inputs.SaeInputs, "features", fingerprints.train_sae),
    Stage(catalogue.SaeGate, 2, inputs.SaeGateInputs, "features", gate=True),
    Stage(catalogue.SupervisedDecoder, 2, inputs.DecoderInputs, "decoder"),
    Stage(catalogue.DecoderGate, 1, inputs.DecoderGateInputs, "decoder", gate=True),
    Stage(catalogue.Policy, 8, inputs.PpoInputs, "rl", fingerprints.train_ppo),
    Stage(catalogue.Controls, 9, inputs.ControlInputs, "rl", gate=True),
    Stage(catalogue.FinalDecoder, 2, inputs.FreezeInputs, "rl"),
    Stage(catalogue.Importance, 4, inputs.RankInputs, "interpretation"),
    Stage(catalogue.Labels, 5, inputs.LabelInputs, "interpretation", fingerprints.label_features),
    Stage(catalogue.Clusters, 3, inputs.ClusterInputs, "interpretation"),
    Stage(catalogue.TrainedExplainer, 5, inputs.ExplainerInputs, "explanations"),
    Stage(catalogue.Evaluation, 5, inputs.EvaluateInputs, "explanations", fingerprints.evaluate),
    Stage(catalogue.Report, 7, inputs.ReportInputs, "explanations"),
)


def stage_named(name: str) -> Stage:
    """The stage called `name`.

    Raises:
        BadInputError: there is none.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise BadInputError(
        f"There is no stage called {name}.", "", f"Stages: {', '.join(s.name for s in STAGES)}."
    )
