"""Which reward makes a decoder faithful? The trap of docs/rl.md, measured with this project's PPO.

    python -m benchmarks.reward_trap

A random GPT-2 of 4 layers with sharp predictions, a random TopK SAE on it and a decoder that starts
at random. The same PPO trains it four times per seed and differs only in how faithfulness enters.
What counts is KL(frozen || decoder) in states that no training has visited: responses that the
frozen model itself gave to test prompts. A toy, in minutes on one core; results: docs/results.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from rldecoder.config.rl import PpoSettings
from rldecoder.decoder.distill import chunked_kl_ce
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.evals.prompts import Split, TaskPrompt, make_prompts
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.random_model import make_random_model
from rldecoder.rl.core import RewardWeights, exact_kl
from rldecoder.rl.learner import Plan, make_learner
from rldecoder.rl.rewards import FaithfulnessReward, RewardInputs, WeightedReward
from rldecoder.rl.rollout import DecoderSampler, Rollout
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator

app = typer.Typer(help=__doc__, add_completion=False)
console = Console(width=120)

HOOK_LAYER, RESPONSE_TOKENS, HELD_OUT_PROMPTS = 2, 12, 64
SHARPER = 2.0
"""Factor on a random model's logits, which are flatter than a trained model's."""
KINDS = {
    "reward -KL(frozen || decoder) of the state": "state",
    "reward log p_frozen(a) - log pi(a)": "action",
    "differentiable KL loss, no reward": "loss",
    "both: action reward and KL loss": "both",
}


class HeldOut(NamedTuple):
    """States of the frozen model's own responses to test prompts. N states."""

    latents: SparseLatents
    frozen_hidden: Tensor
    """[N, D]"""


class StateKl:
    """Minus the KL of the present policy at each state: what the original plan asked for."""

    name = "faithfulness"

    def __init__(self, decoder: SaeDecoderForCausalLM, seen: list[Rollout]) -> None:
        self.decoder, self.seen = decoder, seen

    @torch.no_grad()
    def __call__(self, seen: RewardInputs) -> Tensor:
        """[B, T]; the same whatever token was sampled."""
        rollout, unembed = self.seen[-1], self.decoder.frozen.lm.unembed
        assert rollout.frozen_hidden is not None
        frozen = unembed(rollout.frozen_hidden).log_softmax(-1)
        mine = unembed(self.decoder.hidden(rollout.latents)).log_softmax(-1)
        per_token = -exact_kl(frozen, mine) * seen.mask
        return per_token / seen.mask.sum(-1, keepdim=True).clamp_min(1)


class KeptSampler(DecoderSampler):
    """A sampler that keeps its last rollouts, for a reward that needs the states."""

    def __init__(self, decoder: SaeDecoderForCausalLM) -> None:
        super().__init__(decoder)
        self.seen: list[Rollout] = []

    def __call__(self, prompts: Sequence[TaskPrompt], generator: torch.Generator) -> Rollout:
        """Sample, and remember."""
        self.seen[:] = [super().__call__(prompts, generator)]
        return self.seen[0]


def short(split: Split, count: int, seed: int) -> list[TaskPrompt]:
    """Cloze prompts with answers of a fixed length; the toy model cannot answer them anyway."""
    prompts = make_prompts("cloze", split, count, seed)
    return [replace(prompt, max_new_tokens=RESPONSE_TOKENS) for prompt in prompts]


@torch.no_grad()
def held_out(lm: FrozenLM, sae: Sae) -> HeldOut:
    """The frozen model answers test prompts at temperature 1; its states are kept."""
    states, hidden = [], []
    torch.manual_seed(0)
    model: Any = lm.model
    for prompt in short("test", HELD_OUT_PROMPTS, 0):
        ids = lm.tokenizer(prompt.prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=RESPONSE_TOKENS,
            pad_token_id=lm.pad_token_id,
        )  # fmt: skip
        resid, final = lm.resid_and_final(whole, HOOK_LAYER)
        states.append(resid[0, ids.shape[1] - 1 : -1].float())
        hidden.append(final[0, ids.shape[1] - 1 : -1].float())
    return HeldOut(sae.encode(torch.cat(states)), torch.cat(hidden))


@torch.no_grad()
def held_out_kl(decoder: SaeDecoderForCausalLM, states: HeldOut) -> float:
    """Mean KL(frozen || decoder), nats per state."""
    hidden = decoder.hidden(states.latents)
    return float(chunked_kl_ce(hidden, states.frozen_hidden, decoder.frozen.lm).kl.mean())


def train(kind: str, decoder: SaeDecoderForCausalLM, steps: int, seed: int, folder: Path) -> None:
    """PPO of one kind, in place."""
    from rldecoder.rl.trainer import DecoderPPOTrainer

    settings = PpoSettings(
        batch_size=16, lr=3e-3, warmup_steps=10, replay_tokens=0, kl_penalty=0.0,
        sparsity_loss_coef=0.0, kl_loss_coef=float(kind in ("loss", "both")),
        policy_coef=float(kind != "loss"), matmul_precision="highest",
    )  # fmt: skip
    sampler = KeptSampler(decoder)
    reward = StateKl(decoder, sampler.seen) if kind == "state" else FaithfulnessReward()
    plan = Plan(
        settings=settings, prompts=short("train", steps * settings.batch_size, seed),
        total_steps=steps, rewards=lambda: [WeightedReward(1.0, reward)],
        loss_weights=lambda: RewardWeights(1.0, 0.0, 0.0), replay=None,
        after_step=lambda step: False, seed=seed, output_dir=folder / "trl",
    )  # fmt: skip
    with quiet_transformers():
        DecoderPPOTrainer(make_learner(decoder, settings, seed), plan, sampler).train()
    decoder.requires_grad_(False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=2, help="PPO steps of 16 rollouts.")] = 150,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 3,
) -> None:
    """Train four kinds of decoder and print their held-out KL, one column a seed."""
    with tempfile.TemporaryDirectory() as temporary, Progress(console=console) as progress:
        folder = Path(temporary)

        # The final norm's weight scales all logits.
        lm = FrozenLM.load(make_random_model(folder / "model"))
        with torch.no_grad():
            lm.model.get_parameter("transformer.ln_f.weight").mul_(SHARPER)
        spec = SaeSpec(d_model=lm.d_model, num_latents=256, k=32, hook_layer=HOOK_LAYER)
        sae = Sae.random_init(spec, seed=1)
        states = held_out(lm, sae)

        # Within a seed all kinds start from the same weights, whose own KL is noted once.
        bar = progress.add_task("training", total=len(KINDS) * seeds)
        found: dict[str, list[float]] = {name: [] for name in ("start", *KINDS)}
        for seed in range(seeds):
            for name, kind in KINDS.items():
                decoder = new_decoder(lm, sae)
                with torch.no_grad():
                    decoder.W.normal_(std=0.02, generator=torch_generator(seed, "W"))
                if kind == "state":
                    found["start"].append(held_out_kl(decoder, states))
                train(kind, decoder, steps, seed, folder)
                found[name].append(held_out_kl(decoder, states))
                progress.advance(bar)

    table = Table(title=f"held-out KL(frozen || decoder), nats, after {steps} steps")
    for heading in ("faithfulness enters as", *(f"seed {i}" for i in range(seeds)), "mean"):
        table.add_column(heading)
    for name, values in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in (*values, mean(values))))
    console.print(table)


if __name__ == "__main__":
    app()
