"""Labelled features in the files that other interpretability tools read.

`material` gathers what a tool shows of a feature; `saedashboard`, `neuronpedia` and
`delphi_cache` each write one tool's files. Nothing is sent anywhere.
"""
