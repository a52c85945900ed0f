//! Which subnets and addresses are free.
//!
//! Addresses are handed out round the subnet from a moving cursor, so that a just-freed one comes last: neighbours
//! may still remember its old holder.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::address::{Subnet, address_of, number_of};
use crate::error::{Error, Result};

/// A range that subnets of one size are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetPool {
    pub base: Subnet,
    /// The prefix length of each subnet.
    pub size: u8,
}

/// Docker's default ranges: 172.17.0.0/16 to 172.31.0.0/16, then sixteen /20 of 192.168.0.0/16.
pub fn default_pools() -> Vec<SubnetPool> {
    let v4 = |a, b, prefix, size| SubnetPool {
        base: Subnet::new(IpAddr::from([a, b, 0, 0]), prefix).expect("a short prefix"),
        size,
    };
    let mut pools: Vec<_> = (17..=31).map(|b| v4(172, b, 16, 16)).collect();
    pools.push(v4(192, 168, 16, 20));
    pools
}

/// The first subnet of the pools that none of `taken` overlaps.
pub(crate) fn choose(pools: &[SubnetPool], v4: bool, taken: &[Subnet]) -> Result<Subnet> {
    for pool in pools
        .iter()
        .filter(|p| p.base.is_v4() == v4 && p.size >= p.base.prefix())
    {
        let width: u32 = if v4 { 32 } else { 128 };
        if u32::from(pool.size) > width {
            continue;
        }
        let step = 1u128.checked_shl(width - u32::from(pool.size)).unwrap_or(0);
        let mut at = pool.base.first_number();
        while step != 0 && at <= pool.base.last_number() {
            let candidate = Subnet::new(address_of(at, v4), pool.size).expect("checked above");
            match taken
                .iter()
                .filter(|t| t.overlaps(candidate))
                .map(|t| t.last_number())
                .max()
            {
                None => return Ok(candidate),
                // Past what is in the way, so that a large pool is not walked one by one.
                Some(last) => {
                    let past = last.max(candidate.last_number());
                    match past
                        .checked_add(1)
                        .and_then(|n| n.checked_next_multiple_of(step))
                    {
                        Some(next) => at = next,
                        None => break,
                    }
                }
            }
        }
    }
    Err(Error::PoolsExhausted)
}

/// The addresses of one subnet.
#[derive(Debug)]
pub(crate) struct Addresses {
    subnet: Subnet,
    first: u128,
    last: u128,
    cursor: u128,
    used: HashSet<u128>,
}

impl Addresses {
    /// `range` limits what is handed out, not what may be asked for.
    pub(crate) fn new(subnet: Subnet, range: Option<Subnet>) -> Addresses {
        let (mut low, mut high) = (subnet.first_number(), subnet.last_number());
        // The network's own address and, in IPv4, the broadcast address belong to nobody (RFC 1122; /31 and /127
        // have neither, RFC 3021 and RFC 6164).
        if high - low > 1 {
            low += 1;
            if subnet.is_v4() {
                high -= 1;
            }
        }
        let (first, last) = match range {
            Some(range) => (range.first_number().max(low), range.last_number().min(high)),
            None => (low, high),
        };
        Addresses {
            subnet,
            first,
            last,
            cursor: first,
            used: HashSet::new(),
        }
    }

    pub(crate) fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// Marks one address as taken.
    pub(crate) fn claim(&mut self, address: IpAddr) -> Result<()> {
        let (low, high) = (self.subnet.first_number(), self.subnet.last_number());
        if !self.subnet.contains(address) {
            return Err(Error::invalid(format!(
                "address {address} is not in subnet {}",
                self.subnet
            )));
        }
        let number = number_of(address);
        if high - low > 1 && (number == low || (self.subnet.is_v4() && number == high)) {
            return Err(Error::invalid(format!(
                "address {address} is the network's own or its broadcast address"
            )));
        }
        if self.used.insert(number) {
            Ok(())
        } else {
            Err(Error::AddressInUse(address))
        }
    }

    /// The next free address.
    pub(crate) fn next(&mut self) -> Result<IpAddr> {
        if self.first > self.last {
            return Err(Error::SubnetFull(self.subnet));
        }
        // One more step than there are used ones finds a free one, if any.
        let mut at = self.cursor;
        for _ in 0..=self.used.len() {
            if at < self.first || at > self.last {
                at = self.first;
            }
            if self.used.insert(at) {
                self.cursor = if at == self.last { self.first } else { at + 1 };
                return Ok(address_of(at, self.subnet.is_v4()));
            }
            at = if at >= self.last { self.first } else { at + 1 };
        }
        Err(Error::SubnetFull(self.subnet))
    }

    pub(crate) fn free(&mut self, address: IpAddr) {
        self.used.remove(&number_of(address));
    }

    /// The cursor moves past an address that a container already holds.
    pub(crate) fn advance_past(&mut self, address: IpAddr) {
        let number = number_of(address);
        if number >= self.cursor && number <= self.last {
            self.cursor = if number == self.last {
                self.first
            } else {
                number + 1
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn a_chosen_subnet_avoids_what_is_taken() {
        let taken = [subnet("172.16.0.0/14"), subnet("10.0.0.0/8")];
        assert_eq!(
            choose(&default_pools(), true, &taken).unwrap(),
            subnet("172.20.0.0/16")
        );
        let all = [subnet("172.16.0.0/12"), subnet("192.168.0.0/16")];
        assert!(matches!(
            choose(&default_pools(), true, &all),
            Err(Error::PoolsExhausted)
        ));
    }

    #[test]
    fn a_large_pool_of_ipv6_is_not_walked_one_by_one() {
        let pool = [SubnetPool {
            base: subnet("fd00::/8"),
            size: 64,
        }];
        let chosen = choose(&pool, false, &[subnet("fd00::/9")]).unwrap();
        assert_eq!(chosen, subnet("fd80::/64"));
    }

    #[test]
    fn a_just_freed_address_comes_last() {
        let mut a = Addresses::new(subnet("10.0.0.0/29"), None);
        a.claim("10.0.0.1".parse().unwrap()).unwrap();
        let first = a.next().unwrap();
        a.free(first);
        let mut seen = vec![];
        for _ in 0..5 {
            seen.push(a.next().unwrap());
        }
        assert_eq!(seen.last(), Some(&first));
        assert!(matches!(a.next(), Err(Error::SubnetFull(_))));
    }

    #[test]
    fn network_and_broadcast_addresses_are_nobodys() {
        let mut a = Addresses::new(subnet("10.0.0.0/30"), None);
        assert!(a.claim("10.0.0.0".parse().unwrap()).is_err());
        assert!(a.claim("10.0.0.3".parse().unwrap()).is_err());
        assert!(a.claim("10.0.1.1".parse().unwrap()).is_err());
        assert_eq!(a.next().unwrap().to_string(), "10.0.0.1");
        assert_eq!(a.next().unwrap().to_string(), "10.0.0.2");
        assert!(a.next().is_err());
    }

    #[test]
    fn a_range_limits_what_is_handed_out_only() {
        let mut a = Addresses::new(subnet("10.0.0.0/24"), Some(subnet("10.0.0.128/31")));
        assert_eq!(a.next().unwrap().to_string(), "10.0.0.128");
        assert_eq!(a.next().unwrap().to_string(), "10.0.0.129");
        assert!(a.next().is_err());
        a.claim("10.0.0.7".parse().unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn no_address_has_two_holders(prefix in 24u8..=30, steps in proptest::collection::vec(0u8..3, 0..200)) {
            let mut a = Addresses::new(Subnet::new("10.9.0.0".parse().unwrap(), prefix).unwrap(), None);
            let mut held: Vec<IpAddr> = vec![];
            for step in steps {
                if step == 0 && !held.is_empty() {
                    a.free(held.swap_remove(0));
                } else if let Ok(address) = a.next() {
                    prop_assert!(!held.contains(&address));
                    held.push(address);
                } else {
                    prop_assert_eq!(held.len(), (1usize << (32 - prefix)) - 2);
                }
            }
        }
    }
}
