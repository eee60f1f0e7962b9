"""Decides: intents, catalogue, leases, evidence and the northbound API. Never imports upf."""
