//! Subnets and MAC addresses as values with one text form.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An address with a prefix length, `10.1.2.3/16`. As a subnet the host bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: IpAddr,
    prefix: u8,
}

/// The text is not an address in the wanted form.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {wanted}")]
pub struct InvalidAddress {
    text: String,
    wanted: &'static str,
}

impl InvalidAddress {
    fn new(text: &str, wanted: &'static str) -> InvalidAddress {
        InvalidAddress {
            text: text.chars().take(80).collect(),
            wanted,
        }
    }
}

impl Subnet {
    /// `None` where the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Subnet> {
        (prefix <= width(address)).then_some(Subnet { address, prefix })
    }

    /// The address as given, host bits included.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// The prefix length in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether this is IPv4.
    pub fn is_v4(self) -> bool {
        self.address.is_ipv4()
    }

    /// The same subnet with its host bits cleared.
    pub fn network(self) -> Subnet {
        Subnet {
            address: address_of(self.first_number(), self.is_v4()),
            prefix: self.prefix,
        }
    }

    /// The first address as a number.
    pub fn first_number(self) -> u128 {
        number_of(self.address) & !self.host_mask()
    }

    /// The last address as a number.
    pub fn last_number(self) -> u128 {
        number_of(self.address) | self.host_mask()
    }

    /// The last address, which is the broadcast address in IPv4.
    pub fn last(self) -> IpAddr {
        address_of(self.last_number(), self.is_v4())
    }

    /// Whether `address` lies inside.
    pub fn contains(self, address: IpAddr) -> bool {
        let number = number_of(address);
        address.is_ipv4() == self.is_v4()
            && (self.first_number()..=self.last_number()).contains(&number)
    }

    /// Whether all of `other` lies inside.
    pub fn covers(self, other: Subnet) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    /// Whether any address lies in both.
    pub fn overlaps(self, other: Subnet) -> bool {
        self.is_v4() == other.is_v4()
            && self.first_number() <= other.last_number()
            && other.first_number() <= self.last_number()
    }

    /// The dotted mask of an IPv4 subnet.
    pub fn mask_v4(self) -> Ipv4Addr {
        let bits = if self.prefix == 0 {
            0
        } else {
            u32::MAX << (32 - u32::from(self.prefix).min(32))
        };
        Ipv4Addr::from(bits)
    }

    fn host_mask(self) -> u128 {
        let host = u32::from(width(self.address) - self.prefix);
        if host == 128 {
            u128::MAX
        } else {
            (1u128 << host) - 1
        }
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address as a number; IPv4 in the low 32 bits.
pub(crate) fn number_of(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The reverse of [`number_of`].
pub(crate) fn address_of(number: u128, v4: bool) -> IpAddr {
    if v4 {
        IpAddr::V4(Ipv4Addr::from(number as u32))
    } else {
        IpAddr::V6(Ipv6Addr::from(number))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Subnet {
    type Err = InvalidAddress;
    fn from_str(text: &str) -> Result<Subnet, InvalidAddress> {
        let wanted = "an address with a prefix length, such as 10.20.0.0/16 or fd00:1::/64";
        let parsed = text
            .split_once('/')
            .and_then(|(address, prefix)| Subnet::new(address.parse().ok()?, prefix.parse().ok()?));
        parsed.ok_or_else(|| InvalidAddress::new(text, wanted))
    }
}

impl TryFrom<String> for Subnet {
    type Error = InvalidAddress;
    fn try_from(text: String) -> Result<Subnet, InvalidAddress> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered unicast address that follows from the IPv4 address, so that a
    /// neighbour's cached entry for an address stays true whoever holds it next.
    pub fn of_v4(address: Ipv4Addr) -> Mac {
        let [a, b, c, d] = address.octets();
        Mac([0x02, 0x42, a, b, c, d])
    }

    /// A random locally administered unicast address.
    pub fn random() -> Mac {
        let mut bytes = [0u8; 6];
        getrandom::fill(&mut bytes).expect("the kernel's random source answers");
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Mac(bytes)
    }

    /// Whether an interface may have it: not a group address and not zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = InvalidAddress;
    fn from_str(text: &str) -> Result<Mac, InvalidAddress> {
        let invalid = || InvalidAddress::new(text, "a MAC address, such as 02:42:ac:11:00:02");
        let mut bytes = [0u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(invalid)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            Err(invalid())
        } else {
            Ok(Mac(bytes))
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidAddress;
    fn try_from(text: String) -> Result<Mac, InvalidAddress> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
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
    fn a_subnet_knows_its_bounds() {
        let s = subnet("172.18.5.1/16");
        assert_eq!(s.network(), subnet("172.18.0.0/16"));
        assert_eq!(s.last(), "172.18.255.255".parse::<IpAddr>().unwrap());
        assert_eq!(s.mask_v4(), Ipv4Addr::new(255, 255, 0, 0));
        assert!(subnet("0.0.0.0/0").contains("9.9.9.9".parse().unwrap()));
        assert!(subnet("::/0").contains("fe80::1".parse().unwrap()));
        assert!(!subnet("::/0").contains("9.9.9.9".parse().unwrap()));
    }

    #[test]
    fn overlap_is_symmetric_and_knows_families() {
        assert!(subnet("10.0.0.0/8").overlaps(subnet("10.2.0.0/16")));
        assert!(subnet("10.2.0.0/16").overlaps(subnet("10.0.0.0/8")));
        assert!(!subnet("10.1.0.0/16").overlaps(subnet("10.2.0.0/16")));
        assert!(!subnet("::/0").overlaps(subnet("0.0.0.0/0")));
    }

    #[test]
    fn a_random_mac_is_local_and_unicast() {
        for _ in 0..64 {
            let mac = Mac::random();
            assert!(mac.is_unicast() && mac.0[0] & 2 == 2);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,60}") {
            let _ = text.parse::<Subnet>();
            let _ = text.parse::<Mac>();
        }

        #[test]
        fn text_forms_survive(bytes: [u8; 6], address: u32, prefix in 0u8..=32) {
            prop_assert_eq!(Mac(bytes).to_string().parse::<Mac>().unwrap(), Mac(bytes));
            let s = Subnet::new(IpAddr::V4(address.into()), prefix).unwrap();
            prop_assert_eq!(s.to_string().parse::<Subnet>().unwrap(), s);
        }
    }
}
