"""What stands on top of the page: what this run is of, how far to trust it, prompts to try."""

from __future__ import annotations

from rldecoder.artifacts.catalogue import Evaluation, FinalDecoder, Labels, TrainedExplainer
from rldecoder.evals.comparison import RL, SUPERVISED
from rldecoder.opened import Opened
from rldecoder.serve.pages import MAX_EXAMPLE

EXAMPLES = 5


def about(run: Opened) -> tuple[str, str]:
    """Two sentences: model, layer and text; and what was measured on text like it, and on other."""
    lm, sae = run.lm(), run.sae()
    sources, name = ", ".join(run.sources), run.artifact(Labels).labels.model_name
    first = (
        f"You look into {name} at layer {sae.spec.hook_layer} of {lm.num_layers}, through "
        f"{sae.num_latents:,} latents; SAE, decoder and labels were made from this text: {sources}."
    )
    return first, _trust(run)


def _trust(run: Opened) -> str:
    if run.missing([Evaluation]):
        return (
            "How faithful the decoder is has not been measured yet (`evaluate`), so trust only "
            "what the frozen model does: its interventions are exact on any text."
        )
    model = RL if run.artifact(FinalDecoder).freeze.which == "ppo" else SUPERVISED
    table = run.artifact(Evaluation).faithfulness
    near, far = table["test"][model], table["ood"][model]
    return (
        "On unseen text like it the decoder names the model's next token at "
        f"{100 * near.agreement:.0f} % of tokens (KL {near.kl:.2f} nats), on text of another kind "
        f"at {100 * far.agreement:.0f} % (KL {far.kl:.2f}): trust what it says of your text that "
        "far, while interventions in the frozen model are exact on any text."
    )


def example_prompts(run: Opened) -> tuple[str, ...]:
    """Prompts that the run itself explained, short ones."""
    texts = (one.prompt for one in run.artifact(TrainedExplainer).examples.root)
    short = [text for text in texts if text.isprintable() and len(text) <= MAX_EXAMPLE]
    return tuple(dict.fromkeys(short))[:EXAMPLES]
