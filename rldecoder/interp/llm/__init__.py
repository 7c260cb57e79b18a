"""Labels by a language model: prompts, backends, cache, ledger, budget, judge and its gate."""
