"""The attention executor: a process beside each prefill worker that attends for decode engines."""
