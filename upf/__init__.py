"""Enforces: the nftables gate, policy routing and QoS classes of the user plane function."""
