//! Addresses of exports: `nbd://HOST[:PORT][/EXPORT]` and
//! `nbd+unix:///[EXPORT]?socket=PATH`, percent-encoded.

use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

/// The port that NBD has.
pub const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A host, by name or address, and its port.
    Tcp(String, u16),
    /// A socket in the filesystem.
    Unix(PathBuf),
}

/// An export's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Who has it.
    pub server: Server,
    /// Its name; the server's default has none.
    pub export: String,
}

/// Whether a text is meant to be an address of this kind, and no path.
pub fn is_address(text: &str) -> bool {
    ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:"].iter().any(|scheme| text.starts_with(scheme))
}

fn decode(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.map_err(|_| format!("{text:?} is not UTF-8"))?.into_owned())
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH";
        let (scheme, rest) = text.split_once("://").ok_or_else(|| format!("{text}: not {form}"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export)?;
        let server = match scheme {
            "nbd" => tcp(host).map_err(|why| format!("{text}: {why}"))?,
            "nbd+unix" => {
                let socket = query.split('&').find_map(|word| word.strip_prefix("socket="));
                let socket = socket.ok_or_else(|| format!("{text}: no socket=PATH in it"))?;
                if !host.is_empty() {
                    return Err(format!("{text}: a socket has no host: three slashes"));
                }
                Server::Unix(decode(socket)?.into())
            }
            "nbds" | "nbds+unix" => return Err(format!("{text}: TLS is not supported")),
            _ => return Err(format!("{text}: not {form}")),
        };
        Ok(Self { server, export })
    }
}

fn tcp(host: &str) -> Result<Server, String> {
    if host.contains('@') {
        return Err("users are for TLS, which is not supported".into());
    }
    // A colon in brackets is an IPv6 address's.
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    if name.is_empty() {
        return Err("no host".into());
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| format!("{port:?} is no port"))?,
        None => PORT,
    };
    Ok(Server::Tcp(decode(name)?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_server_and_export() {
        let tcp = |host: &str, port| Server::Tcp(host.into(), port);
        for (text, server, export) in [
            ("nbd://host", tcp("host", 10809), ""),
            ("nbd://host/", tcp("host", 10809), ""),
            ("nbd://10.0.0.1:99/disk", tcp("10.0.0.1", 99), "disk"),
            ("nbd://[::1]:99/a/b%20c", tcp("::1", 99), "a/b c"),
            ("nbd://[::1]", tcp("::1", 10809), ""),
            ("nbd+unix:///disk?socket=/run/s%3f", Server::Unix("/run/s?".into()), "disk"),
            ("nbd+unix://?a=b&socket=/s", Server::Unix("/s".into()), ""),
        ] {
            assert_eq!(text.parse(), Ok(Address { server, export: export.into() }), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_said() {
        for (text, said) in [
            ("nbd:host:99", "not nbd://"),
            ("http://host", "not nbd://"),
            ("nbd:///disk", "no host"),
            ("nbd://host:many", "no port"),
            ("nbds://host", "TLS"),
            ("nbd+unix:///disk", "socket=PATH"),
            ("nbd+unix://disk?socket=/s", "three slashes"),
            ("nbd://host/%ff", "UTF-8"),
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
        assert!(is_address("nbd://x") && is_address("nbd+unix:///") && !is_address("/nbd://x"));
    }
}
