//! After a daemon's restart: what lives is taken over, what nobody owns is swept.

use std::collections::HashSet;

use super::connect::Place;
use super::{Held, Manager, lock};
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, Result};
use crate::network::{Driver, OPTION_ICC};

impl Manager {
    /// Takes over the endpoints of living containers as the caller recorded them, puts the bridges and rules in place
    /// as they shall be, and removes every interface, bridge and rule with this daemon's tag that none of them owns.
    /// To be called once after [`Manager::open`], also with no endpoints.
    ///
    /// # Errors
    /// Where the rules cannot be put in place. One endpoint that cannot be taken over is only logged.
    pub fn restore(&self, live: &[Endpoint]) -> Result<()> {
        self.inside(|| self.restore_here(live))?;
        if let Some(gateway) = &self.config.gateway {
            gateway
                .settle()
                .context(|| "ending ports that were published".into())?;
        }
        Ok(())
    }

    fn restore_here(&self, live: &[Endpoint]) -> Result<()> {
        let mut result = Ok(());
        for endpoint in live {
            if let Err(error) = self.adopt(endpoint) {
                tracing::error!(container = endpoint.container, network = endpoint.network_name, %error,
                    "the network of a running container could not be taken over");
                if matches!(error, Error::NoNft | Error::Nft(_)) {
                    result = Err(error);
                }
            }
        }
        self.sweep(live);
        let mut setup = lock(&self.setup);
        if setup.table {
            self.install_table(&mut setup)?;
        } else if self.table_marker().exists() && lock(&self.state).endpoints.is_empty() {
            self.firewall.remove()?;
            let _ = std::fs::remove_file(self.table_marker());
        }
        result
    }

    fn adopt(&self, endpoint: &Endpoint) -> Result<()> {
        let network = self.inspect(endpoint.network.as_str())?;
        let (forwards, reservations) = self.reserve_again(endpoint);
        {
            let mut state = lock(&self.state);
            let net = state
                .networks
                .get_mut(&network.id)
                .ok_or_else(|| Error::NoSuchNetwork(network.name.clone()))?;
            for address in [endpoint.v4, endpoint.v6].into_iter().flatten() {
                let own = |p: &&mut crate::ipam::Addresses| p.subnet().contains(address.address());
                if let Some(pool) = net.pools.iter_mut().find(own) {
                    pool.claim(address.address())?;
                    pool.advance_past(address.address());
                }
            }
            let held = Held {
                endpoint: endpoint.clone(),
                forwards,
                reservations,
            };
            state.endpoints.insert(endpoint.id.clone(), held);
        }
        self.services.add_endpoint(endpoint);
        if network.driver != Driver::Bridge {
            return Ok(());
        }
        let bridge = self.bring_up(&network.id)?;
        self.lease(endpoint);
        let found = lock(&self.netlink)
            .link(&endpoint.host_interface)
            .ok()
            .flatten();
        match found {
            Some(link) if link.master == Some(bridge) => Ok(()),
            // Someone removed the bridge while no daemon looked.
            Some(link) => {
                let isolated = !network.flag(OPTION_ICC, true);
                self.join_bridge(
                    link.index,
                    bridge,
                    &Place {
                        driver: network.driver,
                        mtu: None,
                        isolated,
                    },
                )
            }
            None => Err(Error::invalid(format!(
                "its interface {} is gone",
                endpoint.host_interface
            ))),
        }
    }

    /// Removes what has our tag and no owner.
    fn sweep(&self, live: &[Endpoint]) {
        let mut owned: HashSet<String> = live.iter().map(|e| e.host_interface.clone()).collect();
        owned.extend(self.list().into_iter().map(|network| network.bridge));
        let leftovers = std::mem::take(&mut *lock(&self.leftovers));
        for name in leftovers.into_iter().filter(|name| !owned.contains(name)) {
            tracing::info!(name, "removing an interface that no container owns");
            self.reap_link(name);
        }
    }
}
