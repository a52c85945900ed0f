//! Machines on the same networks as containers.

use super::Manager;
use crate::endpoint::{Endpoint, EndpointSpec};
use crate::error::{Context, Error, Result};
use crate::namespace::random_name;
use crate::network::Driver;
use crate::tap::{self, Tap, TapOptions};

use super::lock;

impl Manager {
    /// Gives a machine an interface on a bridge network. Release it with [`Manager::release`], by the machine's id.
    ///
    /// # Errors
    /// As [`Manager::connect`]; and where the host has no `/dev/net/tun`.
    pub fn tap(&self, spec: EndpointSpec, options: TapOptions) -> Result<Tap> {
        if !(1..=16).contains(&options.queues) {
            return Err(Error::invalid(format!(
                "{} queues: 1 to 16 are possible",
                options.queues
            )));
        }
        self.inside(|| self.tap_here(spec, options))
    }

    fn tap_here(&self, spec: EndpointSpec, options: TapOptions) -> Result<Tap> {
        let (mut endpoint, place) = self.reserve(spec)?;
        let made = (|| {
            if place.driver != Driver::Bridge {
                return Err(Error::WrongDriver {
                    network: endpoint.network_name.clone(),
                    why: "a machine needs a bridge network".into(),
                });
            }
            let bridge = self.bring_up(&endpoint.network)?;
            let name = random_name(&format!("bt{}", self.config.tag));
            let queues = tap::make(&name, options)
                .context(|| "making a tap interface through /dev/net/tun".into())?;
            let link = lock(&self.netlink)
                .link(&name)
                .context(|| format!("looking for {name}"))?;
            let index = link
                .ok_or_else(|| Error::invalid("the new tap is gone"))?
                .index;
            let _ = crate::sysctl::write(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
            self.join_bridge(index, bridge, &place)?;
            endpoint.host_interface = name;
            Ok(queues)
        })();
        match made {
            Ok(queues) => {
                self.enlist(&endpoint);
                self.lease(&endpoint);
                Ok(Tap {
                    queues,
                    endpoint,
                    mtu: place.mtu,
                })
            }
            Err(error) => {
                self.forget(&endpoint.id);
                Err(error)
            }
        }
    }

    /// Lets the DHCP server know a machine's endpoint.
    pub(super) fn lease(&self, endpoint: &Endpoint) {
        if endpoint.host_interface.starts_with("bt")
            && let Ok(network) = self.inspect(endpoint.network.as_str())
            && let Err(error) = self.services.add_lease(&network, endpoint)
        {
            tracing::error!(network = network.name, %error, "no DHCP server for machines");
        }
    }
}
