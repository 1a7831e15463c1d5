"""Run programs that a model wrote: isolated, within limits, with no processes left behind."""
