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
    Stage(catalogue.ModelFolder, 1, inputs.Nothing, fingerprints.sync_tokenizer),
    Stage(catalogue.Corpus, 2, inputs.IngestInputs, fingerprints.ingest, in_shards=True),
    Stage(catalogue.Baselines, 4, inputs.TextInputs, in_shards=True),
    Stage(catalogue.Sweep, 3, inputs.TextInputs),
    Stage(catalogue.Frontier, 2, inputs.FrontierInputs),
    Stage(catalogue.ActivationCache, 2, inputs.TextInputs, in_shards=True),
    Stage(catalogue.TrainedSae, 4, inputs.SaeInputs, fingerprints.train_sae),
    Stage(catalogue.SaeGate, 2, inputs.SaeGateInputs, gate=True),
    Stage(catalogue.SupervisedDecoder, 2, inputs.DecoderInputs),
    Stage(catalogue.DecoderGate, 1, inputs.DecoderGateInputs, gate=True, in_shards=True),
    Stage(catalogue.Policy, 8, inputs.PpoInputs, fingerprints.train_ppo),
    Stage(catalogue.Controls, 11, inputs.ControlInputs, gate=True),
    Stage(catalogue.FinalDecoder, 3, inputs.FreezeInputs),
    Stage(catalogue.Importance, 4, inputs.RankInputs),
    Stage(catalogue.Labels, 7, inputs.LabelInputs, fingerprints.label_features),
    Stage(catalogue.Clusters, 4, inputs.ClusterInputs),
    Stage(catalogue.TrainedExplainer, 8, inputs.ExplainerInputs),
    Stage(catalogue.Evaluation, 6, inputs.EvaluateInputs, fingerprints.evaluate),
    Stage(catalogue.Report, 11, inputs.ReportInputs),
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
