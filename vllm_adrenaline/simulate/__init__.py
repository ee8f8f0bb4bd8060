"""A discrete-event simulation of prefill and decode engines that runs the placement policy itself."""
