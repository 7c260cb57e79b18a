"""The card of a release, README.md as the hub shows it: numbers with their controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from rldecoder.config.model import RANDOM
from rldecoder.dashboard import collect
from rldecoder.dashboard.build import controls_table, freeze_note
from rldecoder.dashboard.claims import (
    precision_columns,
    precision_note,
    precision_rows,
    simulation_columns,
    simulation_note,
    simulation_rows,
)
from rldecoder.dashboard.label_table import imported_rows, label_columns, label_rows
from rldecoder.dashboard.report import environment
from rldecoder.evals.comparison import RL, SUPERVISED, FaithfulnessTable
from rldecoder.evals.statistics import Measured
from rldecoder.gates import GateReport
from rldecoder.interp.tally import HEADLINE_K, ImportanceMass

if TYPE_CHECKING:
    from rldecoder.lm.pins import ModelPin
    from rldecoder.release.contents import ReleasedCorpus, ReleaseInputs
    from rldecoder.release.manifest import ReleaseManifest

LIBRARY = "rl-decoder"
TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "interpretability", LIBRARY]
HUB_LICENCES = frozenset(
    (
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0",
        "cc-by-sa-4.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense", "openrail", "gemma",
        "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    )
)  # fmt: skip
"""Identifiers that the hub knows; any other licence is `other` there, with its name."""
TEMPLATE = "model_card.md.j2"
NONE = "–"
_SAE_ROWS = (
    ("splice_kl", "KL of the model with the SAE spliced in"),
    ("ce_recovered_zero", "CE recovered, against zero ablation"),
    ("fvu", "fraction of variance unexplained"),
    ("l0_mean", "mean L0"),
    ("normalised_mse", "normalised MSE"),
    ("dead_fraction", "dead latents"),
    ("near_duplicate_fraction", "near-duplicate latents"),
)
_GATE_ROWS = (
    ("", "supervised decoder"),
    ("untrained_", "control: the same before any training"),
    ("residual_lens_", "what an affine lens reads from the whole residual"),
)


def model_card(
    inputs: ReleaseInputs,
    manifest: ReleaseManifest,
    pin: ModelPin,
    corpus: ReleasedCorpus,
    licence: str | None = None,
) -> str:
    """The card, front matter included.

    Args:
        manifest: without its files yet.
        licence: of what is ours; None: not decided here, and the card says so.
    """
    model, targets = inputs.model.record, inputs.evaluation.targets
    claims = inputs.evaluation.interpretability.claims
    sure = sum(feature.high_confidence for feature in inputs.labels.labels.features)
    body = environment(autoescape=False).get_template(TEMPLATE)

    # Markdown, in which nothing is escaped; its numbers are those of the report's tables.
    text = body.render(
        name=manifest.name,
        model=model,
        random=model.name == RANDOM,
        spec=inputs.sae.load().spec,
        labels=inputs.labels.labels,
        sure=sure,
        caveats=list(
            dict.fromkeys(text for one in manifest.artifacts.values() for text in one.caveats)
        ),
        freeze_note=freeze_note(inputs.final.freeze),
        sae_rows=_sae_rows(inputs.sae_gate.report),
        sae_tokens=inputs.sae_gate.report["num_tokens"].value,
        decoder_rows=_decoder_rows(inputs.evaluation.faithfulness),
        gate_rows=_gate_rows(inputs.decoder_gate.report),
        controls=controls_table(inputs.controls),
        label_columns=label_columns(),
        label_rows=label_rows(inputs.labels.controls) + imported_rows(inputs.labels.imported),
        imported=inputs.labels.imported,
        published_sae=inputs.sae.source,
        coverage=inputs.evaluation.interpretability.label_coverage["all"],
        mass_rows=_mass_rows(inputs.importance.mass),
        claim_columns=precision_columns(),
        claim_rows=precision_rows(claims),
        claim_note=precision_note(claims),
        simulation_columns=simulation_columns(),
        simulation_rows=simulation_rows(claims),
        simulation_note=simulation_note(claims),
        targets=targets.root,
        corpus=corpus,
        licence=licence,
        pin=pin,
        manifest=manifest,
    )
    return f"---\n{_front_matter(model.licence, pin, licence)}\n---\n{text.strip()}\n"


def _front_matter(model_licence: str, pin: ModelPin, licence: str | None) -> str:
    """What the hub reads: of the model's licence where ours was not decided."""
    said = licence or model_licence
    known = said.lower() in HUB_LICENCES
    hubs = [source.repo for source in pin.sources if source.kind == "hub"]
    data = ModelCardData(
        license=said.lower() if known else "other",
        license_name=None if known else said,
        library_name=LIBRARY,
        base_model=hubs[0] if hubs else None,
        tags=TAGS,
    )
    return data.to_yaml()


def _sae_rows(report: GateReport) -> list[list[str]]:
    rows = []
    for name, words in _SAE_ROWS:
        entry = report.get(name)
        if entry is not None:
            control = report.get(f"random_{name.removesuffix('_mean')}") or report.get(
                f"random_{name}"
            )
            rows.append(
                [
                    words,
                    _number(entry.value),
                    NONE if control is None else _number(control.value),
                    entry.unit,
                ]
            )
    return rows


def _decoder_rows(table: FaithfulnessTable) -> list[list[str]]:
    """The published decoders on text that no training saw."""
    return [
        [
            words, split, f"{row.kl:.3f} [{row.kl_low:.3f}, {row.kl_high:.3f}]",
            f"{row.agreement:.3f}", f"{row.accuracy:.3f}", f"{row.frozen_accuracy:.3f}",
        ]
        for split in ("test", "ood")
        for model, words in ((SUPERVISED, "supervised"), (RL, "RL"))
        if (row := table[split].get(model)) is not None
    ]  # fmt: skip


def _gate_rows(report: GateReport) -> list[list[str]]:
    """The supervised decoder beside its controls, on the gate's own text."""
    rows = []
    for split in ("test", "ood"):
        for prefix, words in _GATE_ROWS:
            ends = [report.get(f"{split}_{prefix}kl{end}") for end in ("", "_low", "_high")]
            agreement = report.get(f"{split}_{prefix}agreement")
            if ends[0] is None or agreement is None:
                continue
            kl, low, high = (_number(None if end is None else end.value) for end in ends)
            rows.append([words, split, f"{kl} [{low}, {high}]", _number(agreement.value)])
    return rows


def _mass_rows(mass: ImportanceMass) -> list[list[str]]:
    rows = []
    for domain, targets in mass.root.items():
        for target, found in targets.items():
            if found.top_k is not None:
                share = found.top_k[HEADLINE_K].per_position
                error = _interval(found.error_share)
                rows.append([domain, target, _interval(share), error, str(found.num_positions)])
    return rows


def _interval(value: Measured | None) -> str:
    if value is None or value.value is None:
        return NONE
    return f"{_number(value.value)} [{_number(value.low)}, {_number(value.high)}]"


def _number(value: Any) -> str:
    return NONE if value is None else collect.format_value(value)
