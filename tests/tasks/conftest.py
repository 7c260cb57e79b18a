"""Prefect reads its settings when it is imported: none of the user's, nothing sent anywhere."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# One home a pytest-xdist worker: two of them would fight over one server.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
if os.environ.get("RLDECODER_TEST_HOME_OF") != _WORKER:
    os.environ["RLDECODER_TEST_HOME_OF"] = _WORKER
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="rldecoder-prefect-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.pop("PREFECT_API_URL", None)
