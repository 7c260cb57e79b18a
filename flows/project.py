"""The folder that the flows belong to: its configs/, artifacts/ and prefect.yaml."""

from __future__ import annotations

from pathlib import Path

PROJECT_FILE = "prefect.yaml"


def project_folder() -> Path:
    """The checkout that these flows lie in; of an installed package the current folder.

    `rldecoder configs DIR` makes such a folder.
    """
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / PROJECT_FILE).is_file() else Path.cwd()


ROOT = project_folder()
