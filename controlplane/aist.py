"""AIST: the scoped session token, a JWT (RFC 7519) signed with EdDSA over Ed25519 (RFC 8037).

The controller issues, anchors check with the public keys alone (`controlplane.verifier`). A token
is scoped to one UE, one AISI and one lease, and never outlives that lease.
"""

from collections.abc import Sequence
from os import urandom

from controlplane.keys import NS_PER_S, SigningKey
from controlplane.keys import generate_key as generate_key
from controlplane.keys import load_private_key as load_private_key
from controlplane.keys import load_public_key as load_public_key
from controlplane.keys import write_public_key as write_public_key
from controlplane.verifier import AIST_TYPE

ISSUER = "ai-paging"
REQUIRED_CLAIMS = [
    *("iss", "sub", "aud", "exp", "nbf", "jti"),
    *("scope", "aisi", "lease", "epoch", "addresses"),
]
# A lease that ends sooner than this gets an `exp` to the millisecond: a whole second would cost it
# more than a tenth of its life, or all of it.
SHORT_LEASE_NS = 10 * NS_PER_S


def issue(
    key: SigningKey,
    *,
    ue: str,
    addresses: Sequence[str],
    aisi: str,
    lease_id: str,
    epoch: int,
    task: str,
    now_unix_ns: int,
    lease_expires_unix_ns: int,
    issuer: str = ISSUER,
) -> str:
    """Sign a token for one lease.

    `exp` is in whole seconds, which every JWT library reads, or in milliseconds for a short lease
    (RFC 7519, section 2, allows fractions); rounded down, never past the lease.
    """
    expires_unix_s: float = lease_expires_unix_ns // NS_PER_S
    if lease_expires_unix_ns - now_unix_ns < SHORT_LEASE_NS:
        expires_unix_s = lease_expires_unix_ns // 1_000_000 / 1000
    return key.sign(
        AIST_TYPE,
        {
            "iss": issuer,
            "sub": ue,
            "aud": aisi,
            "nbf": now_unix_ns // NS_PER_S,
            "exp": expires_unix_s,
            "jti": urandom(16).hex(),
            "scope": task,
            "aisi": aisi,
            "lease": lease_id,
            "epoch": epoch,
            "addresses": addresses,
        },
    )
