"""Catalogues that tests share."""

CATALOGUE = """
qos_profiles:
  - {name: QOS_E, max_duration_s: 3600}
  - {name: QOS_G, five_qi: 4, guaranteed_downlink_bps: 4000000, guaranteed_uplink_bps: 1000000,
     min_duration_s: 5, max_duration_s: 120}
  - {name: QOS_P, five_qi: 4, guaranteed_downlink_bps: 4000000, priority_level: 2,
     preemption_capability: true, preemption_vulnerability: false}
  - {name: QOS_OFF, status: INACTIVE}
services:
  - {aisi: chat, task: text-generation, model: tokens-1,
     address4: 198.18.0.1, address6: "fd00:a151::1", port: 8000}
  - {aisi: ears, task: automatic-speech-recognition, model: words-1,
     address4: 198.18.0.2, address6: "fd00:a151::2", port: 8001}
anchors:
  - {name: edge1, region: north, trust_tier: 3, slots: 2, cost: 2,
     hosts: [{aisi: chat, service_time_ms: 20}, {aisi: ears, service_time_ms: 20}]}
  - {name: edge2, region: north, trust_tier: 3, slots: 2, cost: 3,
     hosts: [{aisi: chat, service_time_ms: 20}, {aisi: ears, service_time_ms: 20}]}
  - {name: cloud, region: south, trust_tier: 1, slots: 3, cost: 50, path_rtt_ms: 40,
     hosts: [{aisi: chat, service_time_ms: 10}]}
"""

# chat is everywhere, write at the edge3 only; both do the same task
TWO_SERVICES = """
qos_profiles: [{name: QOS_E}, {name: QOS_G, five_qi: 4, guaranteed_downlink_bps: 4000000}]
services:
  - {aisi: chat, task: text-generation, model: m, address4: 198.18.0.1, address6: "fd00:a151::1"}
  - {aisi: write, task: text-generation, model: m, address4: 198.18.0.2, address6: "fd00:a151::2"}
anchors:
  - {name: edge1, region: n, trust_tier: 3, slots: 4, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 3, slots: 1, cost: 9, n6_downlink_bps: 3000000,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge3, region: n, trust_tier: 1, slots: 1, cost: 20,
     hosts: [{aisi: write, service_time_ms: 1}]}
"""
