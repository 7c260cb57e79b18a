"""What every stage publishes: a class a stage, with the name of each of its files, once.

Stages, the report, the server and notebooks read artifacts through these classes. Records and
schemas live beside the code that computes them; nothing here imports torch before it is asked for
a model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rldecoder.artifacts.base import Artifact, Maybe, Plain, Record, Shards, Table

if TYPE_CHECKING:
    import torch

    from rldecoder.data.activation_reader import ActivationReader
    from rldecoder.data.activations import ActivationMeta
    from rldecoder.data.provenance import Provenance
    from rldecoder.decoder.frontier import FrontierVerdict
    from rldecoder.decoder.loading import DecoderOrigin
    from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
    from rldecoder.evals.comparison import FaithfulnessTable
    from rldecoder.evals.harness_scores import HarnessScores
    from rldecoder.evals.targets import Targets
    from rldecoder.explain.claim_scores import ClaimEvaluation
    from rldecoder.explain.explainer import Explainer
    from rldecoder.explain.explanation import ExampleExplanations
    from rldecoder.explain.interpretability import Interpretability
    from rldecoder.explain.pairs import HeldOutFeatures
    from rldecoder.gates import GateReport
    from rldecoder.interp.cluster_record import ClusterRecord
    from rldecoder.interp.imported_labels import ImportedLabels
    from rldecoder.interp.label_controls import LabelControls
    from rldecoder.interp.records import FeatureLabels
    from rldecoder.interp.review_queue import ReviewQueue
    from rldecoder.interp.tally import ImportanceMass
    from rldecoder.interp.validation import EstimatorValidation
    from rldecoder.lm.baselines import BaselineRecord, Timing
    from rldecoder.lm.bos_proof import BosRecord
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.lm.specs import ModelRecord
    from rldecoder.lm.tokenizer_parity import ParityRecord, TokenizerHashes
    from rldecoder.rl.controls import ControlVerdict
    from rldecoder.rl.freeze import Freeze
    from rldecoder.rl.ppo_run import PolicyTraining
    from rldecoder.sae.model import Sae
    from rldecoder.sae.pretrained import SaeSource
    from rldecoder.sae.sweep import Setting, SweepVerdict
    from rldecoder.sae.training import BestSae

CURVES = "rldecoder.schemas:CURVES"


class ModelFolder(Artifact):
    """The frozen model and its tokenizer, proven to belong together."""

    stage, kind = "sync_tokenizer", "model"
    model = Plain("model")
    record: Record[ModelRecord] = Record("model.json", "rldecoder.lm.specs:ModelRecord")
    parity: Record[ParityRecord] = Record(
        "parity.json", "rldecoder.lm.tokenizer_parity:ParityRecord"
    )
    bos: Maybe[BosRecord] = Maybe(Record("bos.json", "rldecoder.lm.bos_proof:BosRecord"))
    hashes: Record[TokenizerHashes] = Record(
        "tokenizer_hashes.json", "rldecoder.lm.tokenizer_parity:TokenizerHashes"
    )
    hashes_page = Plain("tokenizer_hashes.md")

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> FrozenLM:
        """The frozen model; `dtype` None takes the one that the stage recorded."""
        from rldecoder.lm.frozen import FrozenLM

        record = ModelFolder.record.path(self.folder)
        return FrozenLM.load(self.model, device=device, dtype=dtype, record=record)


class Corpus(Artifact):
    """Packed tokens in shards a split, and where the documents came from."""

    stage, kind = "ingest", "tokens"
    shards = Shards("<split>-<number>.parquet")
    documents = Table("documents.parquet", "rldecoder.data.shards:DOCUMENTS")
    provenance: Record[Provenance] = Record(
        "provenance.json", "rldecoder.data.provenance:Provenance"
    )


class Baselines(Artifact):
    """The frozen model on held-out text and tasks, and what lenses read at each layer."""

    stage, kind = "baselines", "baselines"
    affine_lens = Plain("affine_lens.safetensors")
    jacobian_lens = Maybe(Plain("jacobian_lens.safetensors"))
    lens = Table("lens.parquet", "rldecoder.lm.lens:LENS")
    lens_figure = Plain("lens.svg")
    record: Record[BaselineRecord] = Record(
        "baselines.yaml", "rldecoder.lm.baselines:BaselineRecord"
    )
    timing: Record[Timing] = Record("timing.json", "rldecoder.lm.baselines:Timing")


class Sweep(Artifact):
    """Small SAEs at several layers; tables only where a sweep was asked for."""

    stage, kind = "sweep_sae", "sweep"
    cells = Maybe(Table("sweep.parquet", "rldecoder.sae.sweep:CELLS"))
    verdict_record: Record[SweepVerdict] = Record(
        "verdict.json", "rldecoder.sae.sweep:SweepVerdict"
    )
    figure = Plain("sweep.svg")
    saes = Plain("saes")

    def load(self, setting: Setting, device: torch.device | str = "cpu") -> Sae:
        """The SAE of a setting."""
        from rldecoder.sae.model import Sae

        return Sae.load(self.saes / setting.folder, device=device)


class Frontier(Artifact):
    """Faithfulness against layer, depth and L0; a table only where one was asked for."""

    stage, kind = "frontier", "frontier"
    cells = Maybe(Table("frontier.parquet", "rldecoder.decoder.frontier:CELLS"))
    verdict_record: Record[FrontierVerdict] = Record(
        "verdict.json", "rldecoder.decoder.frontier:FrontierVerdict"
    )
    figure = Plain("frontier.svg")


class ActivationCache(Artifact):
    """Residuals and final hidden states of the frozen model, in shards a split."""

    stage, kind = "cache_activations", "activations"
    shards = Shards("<split>-<number>.parquet")

    @cached_property
    def meta(self) -> ActivationMeta:
        """What the rows are."""
        from rldecoder.data.activations import read_meta

        return read_meta(self.folder)

    def reader(self, split: str, window_bytes: int | None = None) -> ActivationReader:
        """Rows of a split; `window_bytes` None takes the reader's own."""
        from rldecoder.data.activation_reader import ActivationReader

        if window_bytes is None:
            return ActivationReader(self.folder, split)
        return ActivationReader(self.folder, split, window_bytes=window_bytes)


class TrainedSae(Artifact):
    """The sparse autoencoder, in the layout of sae_lens."""

    stage, kind = "train_sae", "sae"
    sae = Plain("sae")
    curves = Table("curves.parquet", CURVES)
    best: Record[BestSae] = Record("best.json", "rldecoder.sae.training:BestSae")
    source: Maybe[SaeSource] = Maybe(Record("source.json", "rldecoder.sae.pretrained:SaeSource"))

    def load(self, device: torch.device | str = "cpu") -> Sae:
        """The SAE."""
        from rldecoder.sae.model import Sae

        return Sae.load(self.sae, device=device)


class SaeGate(Artifact):
    """The SAE's QA report."""

    stage, kind = "gate_sae", "qa_report"
    report: Record[GateReport] = Record("report.json", "rldecoder.gates:GateReport")
    density = Table("density.parquet", "rldecoder.schemas:DENSITY")
    density_figure = Plain("density.svg")


class SupervisedDecoder(Artifact):
    """The decoder that was distilled from the frozen model."""

    stage, kind = "train_decoder", "decoder_supervised_init"
    decoder = Plain("decoder")
    lens = Plain("affine_lens.safetensors")
    epochs = Table("epochs.parquet", "rldecoder.decoder.faithfulness:EPOCHS")
    origin: Record[DecoderOrigin] = Record(
        "training.json", "rldecoder.decoder.loading:DecoderOrigin"
    )
    curves = Table("curves.parquet", CURVES)

    def load(self, lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
        """The decoder, attached to the frozen model and the SAE."""
        return _decoder(self.decoder, lm, sae)


class DecoderGate(Artifact):
    """How faithful the supervised decoder is on text that no training saw."""

    stage, kind = "gate_decoder", "decoder_report"
    report: Record[GateReport] = Record("report.json", "rldecoder.gates:GateReport")


class Policy(Artifact):
    """The decoder after PPO; with several seeds the first one's, and the others beside it."""

    stage, kind = "train_ppo", "policy"
    decoder = Plain("decoder")
    training: Record[PolicyTraining] = Record(
        "training.json", "rldecoder.rl.ppo_run:PolicyTraining"
    )
    rollouts = Table("rollouts.parquet", "rldecoder.rl.rollout_log:ROLLOUTS")
    curves = Table("curves.parquet", CURVES)
    evaluations = Table("evaluations.parquet", "rldecoder.rl.evaluation:EVALUATIONS")

    @classmethod
    def trained_folder(cls, folder: Path, number: int) -> Path:
        """Where the decoder of training `number` (from 0) is."""
        return cls.decoder.path(_training_folder(folder, number))

    @classmethod
    def stage_end_folder(cls, folder: Path, number: int, stage: int) -> Path:
        """Where the weights are as they were at the end of reward stage 1, 2 or 3."""
        return cls.decoder.path(_training_folder(folder, number) / f"stage{stage}")

    def load(self, lm: FrozenLM, sae: Sae, number: int = 0) -> SaeDecoderForCausalLM:
        """The decoder of a training, attached."""
        return _decoder(self.trained_folder(self.folder, number), lm, sae)

    def load_end(self, lm: FrozenLM, sae: Sae, number: int = 0) -> SaeDecoderForCausalLM:
        """The decoder as it was at the end of a training."""
        return _decoder(self.stage_end_folder(self.folder, number, 3), lm, sae)


class Controls(Artifact):
    """PPO beside its controls on the test split, and the verdict."""

    stage, kind = "control_ppo", "verdict"
    record: Record[ControlVerdict] = Record("verdict.json", "rldecoder.rl.controls:ControlVerdict")
    systems = Table("controls.parquet", "rldecoder.rl.controls:CONTROLS")
    curves = Table("curves.parquet", CURVES)


class FinalDecoder(Artifact):
    """The published decoder, and whether it is good enough to be called frozen."""

    stage, kind = "freeze_decoder", "decoder_final"
    decoder = Plain("decoder")
    freeze: Record[Freeze] = Record("freeze.json", "rldecoder.rl.freeze:Freeze")

    def load(self, lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
        """The decoder, attached to the frozen model and the SAE."""
        return _decoder(self.decoder, lm, sae)


class Importance(Artifact):
    """How much each latent carries predictions, by domain and target."""

    stage, kind = "rank_features", "importance"
    table = Table("importance.parquet", "rldecoder.interp.tally:IMPORTANCE")
    mass: Record[ImportanceMass] = Record("mass.json", "rldecoder.interp.tally:ImportanceMass")
    validation: Record[EstimatorValidation] = Record(
        "validation.json", "rldecoder.interp.validation:EstimatorValidation"
    )


class Labels(Artifact):
    """Labels of the most important latents with scores, confidence and controls."""

    stage, kind = "label_features", "labels"
    labels: Record[FeatureLabels] = Record(
        "feature_labels.json", "rldecoder.interp.records:FeatureLabels"
    )
    examples = Table("examples.parquet", "rldecoder.interp.examples:EXAMPLES")
    scores = Table("scores.parquet", "rldecoder.interp.scores:SCORES")
    output_scores = Maybe(Table("output_scores.parquet", "rldecoder.interp.kinds:OUTPUT_SCORES"))
    descriptions = Maybe(
        Table("descriptions.parquet", "rldecoder.interp.descriptions:DESCRIPTIONS")
    )
    controls: Record[LabelControls] = Record(
        "controls.json", "rldecoder.interp.label_controls:LabelControls"
    )
    ledger = Maybe(Table("llm_ledger.parquet", "rldecoder.interp.llm.storage:LEDGER"))
    imported: Maybe[ImportedLabels] = Maybe(
        Record("imported_labels.json", "rldecoder.interp.imported_labels:ImportedLabels")
    )
    imported_rows = Maybe(
        Table("imported_labels.parquet", "rldecoder.interp.imported_labels:IMPORTED")
    )


class Clusters(Artifact):
    """Near-duplicates, absorption, flagged latents, and the order of review."""

    stage, kind = "cluster_features", "clusters"
    clusters: Record[ClusterRecord] = Record(
        "clusters.json", "rldecoder.interp.cluster_record:ClusterRecord"
    )
    pairs = Table("pairs.parquet", "rldecoder.interp.clusters:PAIRS")
    absorption = Table("absorption.parquet", "rldecoder.interp.absorption:LINKS")
    queue: Record[ReviewQueue] = Record(
        "review_queue.json", "rldecoder.interp.review_queue:ReviewQueue"
    )

    def load_queue(self, labels: FeatureLabels) -> ReviewQueue:
        """The order of review of these labels; raises DamagedFileError if it is of others."""
        from rldecoder.interp.review_queue import ReviewQueue

        return ReviewQueue.load_for(labels, Clusters.queue.path(self.folder))


class TrainedExplainer(Artifact):
    """Method B (explainer.json, .safetensors), what it learned from, how well its claims hold."""

    stage, kind = "train_explainer", "explainer"
    pairs = Table("pairs.parquet", "rldecoder.explain.pairs:PAIRS")
    held_out: Record[HeldOutFeatures] = Record(
        "held_out_features.json", "rldecoder.explain.pairs:HeldOutFeatures"
    )
    curves = Table("curves.parquet", CURVES)
    evaluation: Record[ClaimEvaluation] = Record(
        "evaluation.json", "rldecoder.explain.claim_scores:ClaimEvaluation"
    )
    examples: Record[ExampleExplanations] = Record(
        "examples.json", "rldecoder.explain.explanation:ExampleExplanations"
    )

    def load(self, device: torch.device | str = "cpu") -> Explainer:
        """The explainer."""
        from rldecoder.explain.explainer import Explainer

        return Explainer.load(self.folder, device=device)


class Evaluation(Artifact):
    """Frozen model, supervised decoder and RL decoder side by side, and the plan's targets."""

    stage, kind = "evaluate", "evaluation"
    tasks = Table("tasks.parquet", "rldecoder.evals.comparison:TASK_SCORES")
    answers = Table("answers.parquet", "rldecoder.evals.comparison:ANSWERS")
    harness: Maybe[HarnessScores] = Maybe(
        Record("lm_eval.json", "rldecoder.evals.harness_scores:HarnessScores")
    )
    faithfulness: Record[FaithfulnessTable] = Record(
        "faithfulness.json", "rldecoder.evals.comparison:FaithfulnessTable"
    )
    interpretability: Record[Interpretability] = Record(
        "interpretability.json", "rldecoder.explain.interpretability:Interpretability"
    )
    targets: Record[Targets] = Record("targets.json", "rldecoder.evals.targets:Targets")


class Report(Artifact):
    """The pages for people, and the numbers on them."""

    stage, kind = "report", "report"
    page = Plain("report.html")
    figures = Plain("figures")
    experiment = Plain("experiment.md")
    summary = Plain("summary.json")
    reproducibility = Plain("reproducibility.md")
    release_notes = Plain("release_notes.md")
    logbook_entry = Plain("logbook_entry.md")


Phase = Literal["prepare", "features", "decoder", "rl", "interpretation", "explanations"]

PHASES: dict[Phase, tuple[type[Artifact], ...]] = {
    "prepare": (ModelFolder, Corpus, Baselines, Sweep, Frontier),
    "features": (ActivationCache, TrainedSae, SaeGate),
    "decoder": (SupervisedDecoder, DecoderGate),
    "rl": (Policy, Controls, FinalDecoder),
    "interpretation": (Importance, Labels, Clusters),
    "explanations": (TrainedExplainer, Evaluation, Report),
}
"""What each part of the pipeline publishes."""

CATALOGUE: tuple[type[Artifact], ...] = tuple(
    kind for published in PHASES.values() for kind in published
)
"""In the order in which they are published."""


def _decoder(folder: Path, lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    from rldecoder.decoder.loading import load_decoder

    return load_decoder(folder, lm, sae)


def _training_folder(policy: Path, number: int) -> Path:
    return policy if number == 0 else policy / "seeds" / str(number)
