//! Exports: the volumes as an NBD client may see them.
//!
//! A volume is an export of the same name. A [`Policy`] says which of them are shown to whom, and can
//! be replaced while the server runs.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use pss_core::volume::device::{BlockDevice, DeviceError, DeviceInfo, Volumes};
use pss_gateway::peer::Network;
pub use pss_gateway::peer::Peer;

use crate::wire::{PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, transmission_flag as flag};

/// Smallest and largest minimum block that the protocol allows, and the smallest preferred one.
const MINIMUM_BLOCK_BYTES_MAX: u32 = 64 << 10;
const PREFERRED_BLOCK_BYTES_MIN: u32 = 512;

/// An export that one client has chosen. The facts stay as they were when it was opened, so that what
/// INFO said holds for GO and for the connection after it; a volume that grows shows its new size to
/// the next connection.
pub struct Export {
    /// Canonical name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Every offset and length is served; this is what is advertised.
    pub minimum_block_bytes: u32,
    /// Below this a request costs more.
    pub preferred_block_bytes: u32,
    /// Whether more than one connection may be made.
    pub multi_conn: bool,
    /// The volume.
    pub device: Arc<dyn BlockDevice>,
    /// Given back when the client is gone.
    _place: Option<Place>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("size_bytes", &self.size_bytes)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl Export {
    /// The export of a device.
    pub fn new(device: Arc<dyn BlockDevice>, read_only: bool) -> Export {
        let info = device.info();
        let minimum = Some(info.minimum_block_bytes)
            .filter(|bytes| bytes.is_power_of_two() && *bytes <= MINIMUM_BLOCK_BYTES_MAX)
            .unwrap_or(1);
        let preferred = Some(info.preferred_block_bytes)
            .filter(|bytes| bytes.is_power_of_two() && *bytes <= PAYLOAD_BYTES_MAX)
            .unwrap_or(4096)
            .max(minimum)
            .max(PREFERRED_BLOCK_BYTES_MIN);
        let mut description = info.description;
        shorten(&mut description);
        Export {
            name: info.name,
            description,
            size_bytes: info.size_bytes,
            read_only: info.read_only || read_only,
            minimum_block_bytes: minimum,
            preferred_block_bytes: preferred,
            multi_conn: true,
            device,
            _place: None,
        }
    }

    /// The transmission flags. FLUSH and FUA hold for every connection to every gateway, because a
    /// write is answered only when a majority of the servers has it on disk: hence CAN_MULTI_CONN.
    pub fn transmission_flags(&self, structured_replies: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        if self.multi_conn {
            flags |= flag::CAN_MULTI_CONN;
        }
        flags |= if self.read_only {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        if structured_replies {
            flags |= flag::SEND_DF;
        }
        flags
    }
}

/// Cuts a string at the longest that the protocol allows.
fn shorten(text: &mut String) {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// One line of a list of exports.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listed {
    /// Name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
}

/// Which volumes are exported, how, and to whom.
///
/// As text, one rule a line; `#` starts a comment:
/// ```text
/// # NAME     OPTION...
/// vol001     read-only  allow=10.0.0.0/8  allow=2001:db8::/32
/// scratch    allow=uid:1000  allow=gid:100  connections=1
/// private-*  hidden
/// *
/// ```
/// The first rule whose name fits a volume decides; a volume that no rule fits is not exported. A
/// name may end in `*`. Without `allow=` everyone may connect; `allow=unix` is everyone on a unix socket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Policy {
    /// Export for clients that name none; otherwise the only volume, if there is only one.
    pub default_export: Option<String>,
    /// Whether all exports are read-only.
    pub read_only: bool,
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

impl Default for Policy {
    /// Every volume, writable, for everyone who can connect.
    fn default() -> Policy {
        Policy {
            default_export: None,
            read_only: false,
            rules: vec![Rule::for_name("*")],
        }
    }
}

impl Policy {
    /// Replaces the rules by those in a text.
    ///
    /// # Errors
    /// The first line that cannot be understood.
    pub fn with_rules(mut self, text: &str) -> Result<Policy, PolicyError> {
        self.rules.clear();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if !line.is_empty() {
                let rule = Rule::parse(line).map_err(|word| PolicyError {
                    line: number + 1,
                    word,
                })?;
                self.rules.push(rule);
            }
        }
        Ok(self)
    }

    fn rule_for(&self, name: &str, peer: Peer) -> Option<&Rule> {
        let rule = self.rules.iter().find(|rule| rule.fits(name))?;
        rule.admits(peer).then_some(rule)
    }
}

/// A line that is no rule.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "line {line}: `{word}` is none of read-only, hidden, connections=N, allow=ADDRESS[/BITS], \
     allow=uid:N, allow=gid:N, allow=unix"
)]
pub struct PolicyError {
    line: usize,
    word: String,
}

/// What holds for the volumes of one name or pattern.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    name: String,
    read_only: bool,
    hidden: bool,
    connections_max: Option<usize>,
    allowed: Vec<Who>,
}

impl Rule {
    fn for_name(name: &str) -> Rule {
        Rule {
            name: name.to_owned(),
            read_only: false,
            hidden: false,
            connections_max: None,
            allowed: Vec::new(),
        }
    }

    fn parse(line: &str) -> Result<Rule, String> {
        let mut words = line.split_whitespace();
        let mut rule = Rule::for_name(words.next().unwrap_or_default());
        for word in words {
            match word.split_once('=') {
                None if word == "read-only" => rule.read_only = true,
                None if word == "hidden" => rule.hidden = true,
                Some(("connections", count)) => {
                    rule.connections_max = Some(count.parse().map_err(|_| word.to_owned())?);
                }
                Some(("allow", who)) => {
                    rule.allowed
                        .push(who.parse().map_err(|()| word.to_owned())?);
                }
                _ => return Err(word.to_owned()),
            }
        }
        Ok(rule)
    }

    fn fits(&self, name: &str) -> bool {
        match self.name.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => self.name == name,
        }
    }

    fn admits(&self, peer: Peer) -> bool {
        self.allowed.is_empty() || self.allowed.iter().any(|who| who.includes(peer))
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Who {
    Network(Network),
    Uid(u32),
    Gid(u32),
    AnyUnix,
}

impl FromStr for Who {
    type Err = ();

    fn from_str(text: &str) -> Result<Who, ()> {
        if text == "unix" {
            return Ok(Who::AnyUnix);
        }
        if let Some(uid) = text.strip_prefix("uid:") {
            return uid.parse().map(Who::Uid).map_err(drop);
        }
        if let Some(gid) = text.strip_prefix("gid:") {
            return gid.parse().map(Who::Gid).map_err(drop);
        }
        text.parse().map(Who::Network).map_err(drop)
    }
}

impl Who {
    fn includes(self, peer: Peer) -> bool {
        match (self, peer) {
            (Who::Network(network), Peer::Ip(peer)) => network.contains(peer),
            (Who::Uid(wanted), Peer::Unix { uid, .. }) => wanted == uid,
            (Who::Gid(wanted), Peer::Unix { gid, .. }) => wanted == gid,
            (Who::AnyUnix, Peer::Unix { .. }) => true,
            _ => false,
        }
    }
}

/// The exports of a server.
pub struct Exports {
    volumes: Arc<dyn Volumes>,
    policy: RwLock<Arc<Policy>>,
    /// Names of the exports in use, once per connection.
    in_use: Arc<Mutex<Vec<String>>>,
}

impl Exports {
    /// Exports volumes by a policy.
    pub fn new(volumes: Arc<dyn Volumes>, policy: Policy) -> Arc<Exports> {
        Arc::new(Exports {
            volumes,
            policy: RwLock::new(Arc::new(policy)),
            in_use: Arc::default(),
        })
    }

    /// Replaces the policy. Connections that are open keep what they have.
    pub fn set_policy(&self, policy: Policy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The exports that `peer` may see.
    ///
    /// # Errors
    /// When the cell cannot be asked.
    pub async fn list(&self, peer: Peer) -> Result<Vec<Listed>, DeviceError> {
        let volumes = self.volumes.list().await?;
        let policy = self.policy();
        let shown = |info: &DeviceInfo| {
            let rule = policy.rule_for(&info.name, peer);
            rule.is_some_and(|rule| !rule.hidden) && info.name.len() <= STRING_BYTES_MAX
        };
        let listed = |mut info: DeviceInfo| {
            shorten(&mut info.description);
            Listed {
                name: info.name,
                description: info.description,
            }
        };
        Ok(volumes.into_iter().filter(shown).map(listed).collect())
    }

    /// Opens an export; an empty name is the default one. `Ok(None)` if there is no such export for
    /// `peer`: whether a volume exists is not told to those who may not use it.
    ///
    /// # Errors
    /// When the cell cannot be asked.
    pub async fn open(&self, name: &str, peer: Peer) -> Result<Option<Export>, DeviceError> {
        let policy = self.policy();
        let wanted = match (&policy.default_export, name) {
            (Some(default), "") => default,
            _ => name,
        };
        // Asking the cell for a name that no rule admits would tell by the time it takes.
        if !wanted.is_empty() && policy.rule_for(wanted, peer).is_none() {
            return Ok(None);
        }
        let Some(device) = self.volumes.open(wanted).await? else {
            return Ok(None);
        };
        let mut export = Export::new(device, policy.read_only);
        let Some(rule) = policy.rule_for(&export.name, peer) else {
            return Ok(None);
        };
        export.read_only |= rule.read_only;
        if let Some(most) = rule.connections_max {
            let Some(place) = Place::take(&self.in_use, &export.name, most) else {
                tracing::info!(volume = export.name, %peer, "export has all its connections");
                return Ok(None);
            };
            export._place = Some(place);
            export.multi_conn = most > 1;
        }
        Ok(Some(export))
    }
}

/// One of the connections that an export may have.
struct Place {
    in_use: Arc<Mutex<Vec<String>>>,
    name: String,
}

impl Place {
    fn take(in_use: &Arc<Mutex<Vec<String>>>, name: &str, most: usize) -> Option<Place> {
        let mut names = in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if names.iter().filter(|used| *used == name).count() >= most {
            return None;
        }
        names.push(name.to_owned());
        Some(Place {
            in_use: Arc::clone(in_use),
            name: name.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut names = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = names.iter().position(|used| *used == self.name) {
            names.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemoryDevice, MemoryVolumes};

    fn ip(text: &str) -> Peer {
        Peer::Ip(text.parse().unwrap())
    }

    fn policy(text: &str) -> Policy {
        Policy::default().with_rules(text).unwrap()
    }

    #[test]
    fn rules_decide_by_name_and_peer() {
        let policy = policy(
            "vol001 allow=10.0.0.0/8 allow=2001:db8::/32 # office\n\
             local allow=uid:1000 allow=gid:100\n\
             \n\
             any-unix allow=unix\n\
             pre* read-only\n",
        );
        let nobody = Peer::Unix { uid: 7, gid: 7 };
        assert!(policy.rule_for("vol001", ip("10.9.8.7")).is_some());
        assert!(policy.rule_for("vol001", ip("::ffff:10.9.8.7")).is_some());
        assert!(policy.rule_for("vol001", ip("2001:db8:1::1")).is_some());
        assert!(policy.rule_for("vol001", ip("11.0.0.1")).is_none());
        assert!(policy.rule_for("vol001", nobody).is_none());
        assert!(
            policy
                .rule_for("local", Peer::Unix { uid: 1000, gid: 7 })
                .is_some()
        );
        assert!(
            policy
                .rule_for("local", Peer::Unix { uid: 7, gid: 100 })
                .is_some()
        );
        assert!(policy.rule_for("local", nobody).is_none());
        assert!(policy.rule_for("any-unix", nobody).is_some());
        assert!(policy.rule_for("any-unix", ip("127.0.0.1")).is_none());
        assert!(policy.rule_for("prefix", nobody).unwrap().read_only);
        assert!(policy.rule_for("other", nobody).is_none());
    }

    #[test]
    fn rule_with_a_bad_word_names_line_and_word() {
        for (text, line, word) in [
            ("a\nb wrong", 2, "wrong"),
            ("a allow=10.0.0.0/33", 1, "allow=10.0.0.0/33"),
            ("a allow=host", 1, "allow=host"),
            ("a connections=x", 1, "connections=x"),
        ] {
            let error = Policy::default().with_rules(text).unwrap_err();
            assert_eq!((error.line, error.word.as_str()), (line, word));
        }
    }

    #[test]
    fn zero_bits_fit_all() {
        assert!(
            policy("* allow=0.0.0.0/0")
                .rule_for("a", ip("1.2.3.4"))
                .is_some()
        );
        assert!(policy("* allow=::/0").rule_for("a", ip("::1")).is_some());
    }

    #[tokio::test]
    async fn hidden_exports_open_but_are_not_listed() {
        let volumes =
            MemoryVolumes::new([MemoryDevice::new("a", 4096), MemoryDevice::new("b", 4096)]);
        let exports = Exports::new(volumes, policy("a hidden\n* allow=127.0.0.1"));
        let names = async |peer| {
            let listed = exports.list(peer).await.unwrap();
            listed
                .into_iter()
                .map(|export| export.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(ip("127.0.0.1")).await, ["b"]);
        assert!(names(ip("127.0.0.2")).await.is_empty());
        assert!(exports.open("a", ip("127.0.0.2")).await.unwrap().is_some());
        assert!(exports.open("b", ip("127.0.0.2")).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn place_of_a_connection_comes_back() {
        // nbd#126: the slot of a connection that ended was never returned.
        let volumes = MemoryVolumes::new([MemoryDevice::new("a", 4096)]);
        let exports = Exports::new(volumes, policy("a connections=1"));
        let first = exports.open("a", ip("::1")).await.unwrap();
        assert!(first.is_some());
        assert!(exports.open("a", ip("::1")).await.unwrap().is_none());
        drop(first);
        assert!(exports.open("a", ip("::1")).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn default_export_and_read_only_by_policy() {
        let volumes =
            MemoryVolumes::new([MemoryDevice::new("a", 4096), MemoryDevice::new("b", 8192)]);
        let mut policy = Policy::default();
        let exports = Exports::new(volumes, policy.clone());
        assert!(exports.open("", ip("::1")).await.unwrap().is_none());
        policy.default_export = Some("b".into());
        policy.read_only = true;
        exports.set_policy(policy);
        let export = exports.open("", ip("::1")).await.unwrap().unwrap();
        assert_eq!((export.name.as_str(), export.read_only), ("b", true));
    }

    #[test]
    fn flags_of_an_export() {
        let export = Export::new(Arc::new(MemoryDevice::new("a", 4096)), false);
        // proto.md: SEND_DF only when structured replies were negotiated.
        assert_eq!(export.transmission_flags(false), 0b1101_0110_1101);
        assert_eq!(export.transmission_flags(true), 0b1101_1110_1101);
        let export = Export::new(Arc::new(MemoryDevice::new("a", 4096)), true);
        assert_eq!(export.transmission_flags(true), 0b0101_1000_1111);
    }
}
