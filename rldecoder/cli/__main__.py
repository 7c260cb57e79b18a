"""`python -m rldecoder.cli` is `rldecoder`."""

from rldecoder.cli.main import main

main()
