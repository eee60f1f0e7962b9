// The fast path (upf/fastpath.py): datagrams that a live lease covers are forwarded where they
// come in, at tc ingress of N3 and N6, past the IP stack. Whatever else comes, or looks in any way
// unusual, goes on to the gate as if this were not there: it only ever lets through.
//
// The structures are those of upf/fastpath.py. Addresses are in network byte order, all else in the
// host's.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define NOT_OURS (-1) // TCX_NEXT: to other programs here, and to the gate
#define NOT_A_WHOLE bpf_htons(0x3fff) // more fragments, or an offset

struct flow4 { // as packets have it; downlink with the N6 interface it comes by, uplink with 0
	__be32 source, destination;
	__u32 interface;
};

struct flow6 {
	struct in6_addr source, destination;
	__u32 interface;
};

struct lease {
	__u64 until_ns; // CLOCK_MONOTONIC
	__u64 packets, bytes; // let through
	__u64 tag; // which lease this is
	__u32 ue; // its number in `ues`
	__u32 class_id, dscp; // downlink: tc class, and code point (0: as it is)
	__u32 device; // uplink: where its anchor is
};

struct lease4 {
	struct lease lease;
	__be32 neighbour;
};

struct lease6 {
	struct lease lease;
	struct in6_addr neighbour;
};

struct hop { // where a UE is; device 0: no way there
	__u32 device;
	union {
		__be32 ipv4;
		struct in6_addr ipv6;
	} neighbour;
};

struct place { // a UE may come by this N3 interface
	__u32 ue, interface;
};

const volatile struct {
	__u32 anywhere; // every UE may come by every N3 interface
	__u32 longest_up, longest_down; // longest packet that surely fits ahead, bytes
	__u8 fingerprint[16]; // of the configuration
} settings;

#define LEASES(NAME, KEY, VALUE)                   \
	struct {                                   \
		__uint(type, BPF_MAP_TYPE_HASH);   \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__uint(max_entries, 1 << 18);      \
		__type(key, KEY);                  \
		__type(value, VALUE);              \
	} NAME SEC(".maps")

LEASES(up4, struct flow4, struct lease4);
LEASES(up6, struct flow6, struct lease6);
LEASES(down4, struct flow4, struct lease4);
LEASES(down6, struct flow6, struct lease6);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); // as many as there are UEs
	__type(key, __u32);
	__type(value, struct hop);
} ues SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); // as many as there are places
	__type(key, struct place);
	__type(value, __u32);
} access SEC(".maps");

// Is the lease live? Then the packet is counted.
static __always_inline int let_through(struct __sk_buff *skb, struct lease *lease)
{
	if (bpf_ktime_get_ns() >= lease->until_ns)
		return 0;
	__sync_fetch_and_add(&lease->packets, 1);
	__sync_fetch_and_add(&lease->bytes, skb->len - ETH_HLEN);
	return 1;
}

static __always_inline int may_come_here(struct __sk_buff *skb, struct lease *lease)
{
	struct place place = {lease->ue, skb->ingress_ifindex};

	return settings.anywhere || bpf_map_lookup_elem(&access, &place);
}

static __always_inline struct hop *way_to(struct lease *lease)
{
	struct hop *hop = bpf_map_lookup_elem(&ues, &lease->ue);

	return hop && hop->device ? hop : 0;
}

// An untagged packet for this router, no longer than what fits ahead.
static __always_inline int ordinary(struct __sk_buff *skb, __u32 longest)
{
	return skb->pkt_type == PACKET_HOST && !skb->vlan_present &&
	       skb->len - ETH_HLEN <= longest;
}

// A header of this size, where the program may read and write it; 0: there is none.
static __always_inline void *header(struct __sk_buff *skb, __u32 size)
{
	void *frame = (void *)(long)skb->data;

	if (frame + ETH_HLEN + size > (void *)(long)skb->data_end) {
		if (bpf_skb_pull_data(skb, ETH_HLEN + size))
			return 0;
		frame = (void *)(long)skb->data;
		if (frame + ETH_HLEN + size > (void *)(long)skb->data_end)
			return 0;
	}
	return frame + ETH_HLEN;
}

// A whole UDP datagram without options that may travel on.
static __always_inline struct iphdr *datagram4(struct __sk_buff *skb)
{
	struct iphdr *ip = header(skb, sizeof(*ip));

	if (!ip || ip->version != 4 || ip->ihl != 5 || ip->frag_off & NOT_A_WHOLE ||
	    ip->protocol != IPPROTO_UDP || ip->ttl < 2 ||
	    bpf_ntohs(ip->tot_len) > skb->len - ETH_HLEN)
		return 0;
	return ip;
}

static __always_inline struct ipv6hdr *datagram6(struct __sk_buff *skb)
{
	struct ipv6hdr *ip = header(skb, sizeof(*ip));

	if (!ip || ip->version != 6 || ip->nexthdr != IPPROTO_UDP || ip->hop_limit < 2 ||
	    bpf_ntohs(ip->payload_len) + sizeof(*ip) > skb->len - ETH_HLEN)
		return 0;
	return ip;
}

// Put a word in the place of another; the checksum stays right (RFC 1624, equation 3).
static __always_inline void put_word(struct iphdr *ip, int number, __u16 value)
{
	__u16 *word = (__u16 *)ip + number;
	__u32 sum = (__u16)~ip->check + (__u16)~*word + value;

	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~(sum + (sum >> 16));
	*word = value;
}

static __always_inline int forward4(struct iphdr *ip, __u32 device, __be32 neighbour)
{
	struct bpf_redir_neigh to = {.nh_family = AF_INET, .ipv4_nh = neighbour};

	put_word(ip, 4, ((__u16 *)ip)[4] - bpf_htons(0x0100)); // time to live, and protocol
	return bpf_redirect_neigh(device, &to, sizeof(to), 0);
}

static __always_inline int forward6(struct ipv6hdr *ip, __u32 device, struct in6_addr *neighbour)
{
	struct bpf_redir_neigh to = {.nh_family = AF_INET6};

	__builtin_memcpy(to.ipv6_nh, neighbour, sizeof(to.ipv6_nh));
	ip->hop_limit--;
	return bpf_redirect_neigh(device, &to, sizeof(to), 0);
}

SEC("tc")
int aipaging_n3(struct __sk_buff *skb)
{
	if (!ordinary(skb, settings.longest_up))
		return NOT_OURS;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = datagram4(skb);
		if (!ip)
			return NOT_OURS;
		struct flow4 flow = {ip->saddr, ip->daddr, 0};
		struct lease4 *up = bpf_map_lookup_elem(&up4, &flow);
		if (!up || !may_come_here(skb, &up->lease) || !let_through(skb, &up->lease))
			return NOT_OURS;
		return forward4(ip, up->lease.device, up->neighbour);
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = datagram6(skb);
		if (!ip)
			return NOT_OURS;
		struct flow6 flow = {ip->saddr, ip->daddr, 0};
		struct lease6 *up = bpf_map_lookup_elem(&up6, &flow);
		if (!up || !may_come_here(skb, &up->lease) || !let_through(skb, &up->lease))
			return NOT_OURS;
		return forward6(ip, up->lease.device, &up->neighbour);
	}
	return NOT_OURS;
}

SEC("tc")
int aipaging_n6(struct __sk_buff *skb)
{
	if (!ordinary(skb, settings.longest_down))
		return NOT_OURS;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = datagram4(skb);
		if (!ip)
			return NOT_OURS;
		struct flow4 flow = {ip->saddr, ip->daddr, skb->ingress_ifindex};
		struct lease4 *down = bpf_map_lookup_elem(&down4, &flow);
		struct hop *hop = down ? way_to(&down->lease) : 0;
		if (!hop || !let_through(skb, &down->lease))
			return NOT_OURS;
		skb->priority = down->lease.class_id;
		if (down->lease.dscp) // over all of the second byte but ECN
			put_word(ip, 0,
				 (((__u16 *)ip)[0] & bpf_htons(0xff03)) |
					 bpf_htons(down->lease.dscp << 2));
		return forward4(ip, hop->device, hop->neighbour.ipv4);
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = datagram6(skb);
		if (!ip)
			return NOT_OURS;
		struct flow6 flow = {ip->saddr, ip->daddr, skb->ingress_ifindex};
		struct lease6 *down = bpf_map_lookup_elem(&down6, &flow);
		struct hop *hop = down ? way_to(&down->lease) : 0;
		if (!hop || !let_through(skb, &down->lease))
			return NOT_OURS;
		skb->priority = down->lease.class_id;
		if (down->lease.dscp)
			*(__be16 *)ip = (*(__be16 *)ip & bpf_htons(0xf03f)) |
					bpf_htons(down->lease.dscp << 6);
		return forward6(ip, hop->device, &hop->neighbour.ipv6);
	}
	return NOT_OURS;
}
