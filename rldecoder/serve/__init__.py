"""The local server: live prompts, exact interventions, feature search, label review."""
