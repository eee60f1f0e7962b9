"""The northbound interface: HTTP over the control plane, and nothing that decides."""
