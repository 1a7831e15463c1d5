"""Runs programs that a model wrote: isolated, within limits, and gone afterwards."""
