"""The metrics of published benchmarks, as functions of answers, captions and scores; nothing here knows a model."""
