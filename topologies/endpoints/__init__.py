"""Programs that run inside emulated hosts: probe, UE agent, anchor server."""
