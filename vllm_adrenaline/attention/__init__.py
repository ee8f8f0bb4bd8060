"""The attention executor: a process beside each prefill worker that computes attention for decode engines."""
