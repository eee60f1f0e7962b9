"""Relocation by leases beside what people use today: `aipaging bench user-plane --part switch`."""
