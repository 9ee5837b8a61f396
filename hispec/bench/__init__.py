"""Comparing decoding methods on the same prompts, side by side.

    prompts   what is asked            methods, baselines   what answers
    run       who runs when            folder               what is kept of it, and resuming
    stats     intervals                summary              rows → the tables' numbers
    report    Markdown, HTML page      sweep                which exits and windows are best

Every number of a report is computed from the raw rows of a run's folder and nothing else, so a
report can be made again, or of several runs, without a model.
"""
