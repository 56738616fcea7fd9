//! An instance that runs already: it is resolved, asked how it is, and let go.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
};

use rustls::pki_types::ServerName;
use tokio::time::{Instant, sleep};

use super::{
    Assignment, Node, Order, Orders,
    health::{Check, Probes, Verdict, Watch},
    process::backoff,
    record::{Record, Why},
};

#[derive(Debug, thiserror::Error)]
pub(super) enum EndpointError {
    #[error("'{0}' is not an endpoint such as http://host:port or https://host:port")]
    Malformed(String),
    #[error("cannot resolve '{0}': {1}")]
    Resolve(String, std::io::Error),
    #[error("'{0}' has no address: look at the name server")]
    NoAddress(String),
    #[error(
        "endpoint '{0}' is refused: {1} is a link-local address; make a version that names another"
    )]
    LinkLocal(String, IpAddr),
    #[error(
        "endpoint '{0}' is refused: {1} is one of Weir's own listeners; make a version that names another"
    )]
    Own(String, SocketAddr),
    #[error(
        "endpoint '{0}' is refused: {1} is among the ports of this machine's own instances (--instance-ports)"
    )]
    Instances(String, SocketAddr),
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    /// As written.
    host: String,
    port: Option<u16>,
    /// Of the certificate, over TLS.
    name: Option<ServerName<'static>>,
}

fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

fn parse(endpoint: &str) -> Result<Parsed, EndpointError> {
    let wrong = || EndpointError::Malformed(endpoint.to_owned());
    let uri: http::Uri = endpoint.parse().map_err(|_| wrong())?;
    let secure = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(wrong()),
    };
    let plain = matches!(uri.path(), "" | "/");
    let authority = uri.authority().filter(|a| !a.as_str().contains('@'));
    let authority = authority.ok_or_else(wrong)?;
    if !plain || uri.query().is_some() || authority.host().is_empty() {
        return Err(wrong());
    }
    // What follows the host is a port, or it is nothing.
    let port = authority.port_u16();
    if port.is_none() && authority.as_str() != authority.host() {
        return Err(wrong());
    }
    let host = authority.host().to_owned();
    let name = match secure {
        true => Some(ServerName::try_from(bare(&host).to_owned()).map_err(|_| wrong())?),
        false => None,
    };
    Ok(Parsed { host, port, name })
}

fn link_local(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Whether a connection to the address ends on this machine.
fn is_here(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok()
}

/// Whether an agent on this machine gives its instances such addresses. They are one account's, and behind a
/// queue and keys: nobody's endpoint.
pub(crate) fn is_an_instances(address: SocketAddr, ports: &RangeInclusive<u16>) -> bool {
    ports.contains(&address.port()) && is_here(address.ip())
}

fn own(address: SocketAddr, forbidden: &[SocketAddr]) -> bool {
    let canonical = |ip: IpAddr| match ip.to_canonical() {
        // Connecting to "any" ends at the loopback address.
        ip if ip.is_unspecified() => None,
        ip => Some(ip),
    };
    let target = canonical(address.ip()).unwrap_or(Ipv4Addr::LOCALHOST.into());
    forbidden
        .iter()
        .filter(|f| f.port() == address.port())
        .any(|f| canonical(f.ip()).map_or_else(|| is_here(target), |ip| ip == target))
}

/// Why the host of an endpoint can't be an instance, as far as it shows. What another name than `localhost` means
/// shows only when it is looked up, and is looked at then.
pub(crate) fn forbidden(
    host: &str,
    ports: &[u16],
    listeners: &[SocketAddr],
) -> Option<&'static str> {
    let host = bare(host);
    let host = host.strip_suffix('.').unwrap_or(host);
    let last = host.rsplit('.').next().unwrap_or_default();
    let local = last.eq_ignore_ascii_case("localhost");
    let meant: Vec<IpAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![ip.to_canonical()],
        Err(_) if local => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        // Resolvers take such for addresses: 2852039166 and 0xa9fea9fe are 169.254.169.254.
        Err(_) if is_number(last) => {
            return Some("has to be a name, or an address such as 10.0.0.5");
        }
        Err(_) => return None,
    };
    if meant.iter().any(|ip| link_local(*ip)) {
        return Some("is a link-local address, where no instance may be: name another address");
    }
    if meant.iter().any(IpAddr::is_unspecified) {
        return Some("is every address of this machine: name the one that the server listens on");
    }
    let own = meant.iter().any(|ip| {
        let mut used = ports.iter().map(|port| SocketAddr::new(*ip, *port));
        used.any(|address| own(address, listeners))
    });
    own.then_some(
        "(or its health.port) is Weir's own listener: name the server that Weir is to call",
    )
}

/// Whether resolvers take a host whose last part this is for an IPv4 address.
fn is_number(part: &str) -> bool {
    match part.strip_prefix("0x").or(part.strip_prefix("0X")) {
        Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
        None => !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()),
    }
}

/// Where the endpoint takes requests, and how it is asked for its health.
async fn resolve(
    endpoint: &str,
    assignment: &Assignment,
    node: &Node,
) -> Result<Target, EndpointError> {
    let Parsed { host, port, name } = parse(endpoint)?;
    let version = &assignment.version;
    let usual = if name.is_some() { 443 } else { 80 };
    let port = port.or(version.inference_port).unwrap_or(usual);
    let found = tokio::net::lookup_host((bare(&host), port))
        .await
        .map_err(|e| EndpointError::Resolve(endpoint.to_owned(), e))?;
    let mut first = None;
    for address in found {
        if link_local(address.ip()) {
            return Err(EndpointError::LinkLocal(endpoint.to_owned(), address.ip()));
        }
        let health = SocketAddr::new(address.ip(), version.health.port.unwrap_or(port));
        for used in [address, health] {
            if own(used, &node.forbidden) {
                return Err(EndpointError::Own(endpoint.to_owned(), used));
            }
            if is_an_instances(used, &node.ports.range()) {
                return Err(EndpointError::Instances(endpoint.to_owned(), used));
            }
        }
        // Of a name with several addresses, an IPv4 one: most servers have it.
        if first.is_none_or(|(a, _): (SocketAddr, SocketAddr)| a.is_ipv6() && address.is_ipv4()) {
            first = Some((address, health));
        }
    }
    let (address, health) = first.ok_or_else(|| EndpointError::NoAddress(endpoint.to_owned()))?;
    let check = Check::new(&version.health, health, format!("{host}:{}", health.port()));
    Ok(Target {
        address,
        check: match name.clone() {
            Some(name) => check.over_tls(node.trust.clone(), name),
            None => check,
        },
        name,
    })
}

struct Target {
    address: SocketAddr,
    name: Option<ServerName<'static>>,
    check: Check,
}

/// Lasts until the instance is stopped.
pub(super) async fn supervise(
    node: &Node,
    assignment: &Assignment,
    record: &mut Record,
    orders: &mut Orders,
) {
    let endpoint = assignment.endpoint.clone().unwrap_or_default();
    let mut failures = 0;
    loop {
        let target = tokio::select! {
            order = orders.recv() => match order {
                None | Some(Order::Stop) => return,
                Some(Order::Deployed(now)) => { record.deployed(now); continue }
                Some(Order::Drain) => { record.drain(); continue }
                Some(Order::Suspect) => continue,
            },
            target = resolve(&endpoint, assignment, node) => target,
        };
        let target = match target {
            Ok(target) => target,
            Err(error) => {
                record.instance.address = None;
                record.instance.server_name = None;
                record.error(Why::hidden("its endpoint can't be used", error.to_string()));
                failures += 1;
                let pause = sleep(backoff(failures + 1));
                tokio::pin!(pause);
                loop {
                    tokio::select! {
                        order = orders.recv() => match order {
                            None | Some(Order::Stop) => return,
                            Some(Order::Deployed(now)) => record.deployed(now),
                            Some(Order::Drain) => record.drain(),
                            Some(Order::Suspect) => (),
                        },
                        () = &mut pause => break,
                    }
                }
                continue;
            }
        };
        failures = 0;
        record.instance.address = Some(target.address);
        record.instance.server_name = target.name.as_ref().map(|name| name.to_str().into_owned());
        record.tell();
        if become_ready(record, orders, &target.check).await.is_none()
            || stay_ready(record, orders, &target.check).await.is_none()
        {
            return;
        }
        // Down: its name may mean another address by now.
    }
}

/// None: stopped.
async fn become_ready(record: &mut Record, orders: &mut Orders, check: &Check) -> Option<()> {
    let started = Instant::now();
    let mut probes = Probes::new(check.clone(), started);
    let mut late = false;
    loop {
        let start_timeout = record.deployment.start_timeout;
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                None | Some(Order::Stop) => return None,
                Some(Order::Deployed(now)) => record.deployed(now),
                Some(Order::Drain) => record.drain(),
                Some(Order::Suspect) => (),
            },
            () = probes.passed() => {
                record.ready();
                return Some(());
            }
            () = tokio::time::sleep_until(started + start_timeout.0), if !late => {
                late = true;
                record.error(format!(
                    "did not become ready within {start_timeout}; last probe of {}: {}; start that server, or correct the health check",
                    probes.check, probes.last
                ));
            }
        }
    }
}

/// Some: it is down.
async fn stay_ready(record: &mut Record, orders: &mut Orders, check: &Check) -> Option<()> {
    let mut watch = Watch::new(check.clone());
    loop {
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                None | Some(Order::Stop) => return None,
                Some(Order::Deployed(now)) => record.deployed(now),
                Some(Order::Drain) => record.drain(),
                Some(Order::Suspect) => watch.suspect(),
            },
            verdict = watch.verdict() => match verdict {
                Verdict::Well => record.ready(),
                Verdict::Doubtful(error) => record.error(format!("health check failed: {error}")),
                Verdict::Ill(error) => {
                    record.error(format!("health check failed 3 times in a row: {error}"));
                    return Some(());
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_parsed() {
        let parsed = |endpoint: &str| {
            let Parsed { host, port, name } = parse(endpoint).unwrap();
            let name = name.map(|name| name.to_str().into_owned());
            (host, port, name.unwrap_or_default())
        };
        for (endpoint, host, port, name) in [
            ("http://a.b:81", "a.b", Some(81), ""),
            ("http://[::1]/", "[::1]", None, ""),
            ("https://a.b", "a.b", None, "a.b"),
            ("https://[::1]:82", "[::1]", Some(82), "::1"),
            ("https://10.0.0.5:82/", "10.0.0.5", Some(82), "10.0.0.5"),
        ] {
            assert_eq!(parsed(endpoint), (host.into(), port, name.into()));
        }
        for wrong in [
            "a:80",
            "https://",
            "https://-",
            "http://a/b",
            "http://u@a",
            "http://a:",
            "http://a:99999",
            "",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_host_shows_is_looked_at_before_it_is_used() {
        let own = ["127.0.0.1:8080".parse().unwrap()];
        for host in [
            "169.254.169.254",
            "169.254.169.254.",
            "[fe80::1]",
            "[::ffff:169.254.1.1]",
            "2852039166",
            "0xa9fea9fe",
            "0251.0376.0251.0376",
            "169.254.43518",
            "0.0.0.0",
            "[::]",
            "[::ffff:0.0.0.0]",
            "127.0.0.1",
            "[::ffff:127.0.0.1]",
            "localhost",
            "a.LOCALHOST.",
        ] {
            assert!(forbidden(host, &[8080], &own).is_some(), "{host}");
        }
        for host in [
            "10.0.0.5",
            "127.0.0.2",
            "[2001:db8::1]",
            "gpu-7",
            "3090-box",
            "a.0xyz",
        ] {
            assert_eq!(forbidden(host, &[8080], &own), None, "{host}");
        }
        assert_eq!(forbidden("127.0.0.1", &[9000], &own), None);
        assert!(forbidden("127.0.0.1", &[9000, 8080], &own).is_some());
    }

    #[test]
    fn own_listeners_are_recognised_under_other_names() {
        let at = |s: &str| s.parse::<SocketAddr>().unwrap();
        let any = [at("0.0.0.0:8080")];
        for name in [
            "127.0.0.1:8080",
            "127.0.0.9:8080",
            "0.0.0.0:8080",
            "[::1]:8080",
            "[::]:8080",
            "[::ffff:127.0.0.1]:8080",
        ] {
            assert!(own(at(name), &any), "{name}");
        }
        assert!(!own(at("127.0.0.1:8081"), &any));
        assert!(!own(at("192.0.2.1:8080"), &any));
        let one = [at("127.0.0.1:8080")];
        assert!(own(at("0.0.0.0:8080"), &one) && !own(at("127.0.0.2:8080"), &one));
        for (name, theirs) in [
            ("127.0.0.1:20000", true),
            ("127.9.9.9:20999", true),
            ("0.0.0.0:20000", true),
            ("[::1]:20000", true),
            ("[::ffff:127.0.0.1]:20000", true),
            ("127.0.0.1:19999", false),
            ("192.0.2.1:20000", false),
        ] {
            assert_eq!(
                is_an_instances(at(name), &(20000..=20999)),
                theirs,
                "{name}"
            );
        }
        assert!(link_local("169.254.169.254".parse().unwrap()));
        assert!(link_local("::ffff:169.254.1.1".parse().unwrap()));
        assert!(link_local("fe80::1".parse().unwrap()));
    }
}
