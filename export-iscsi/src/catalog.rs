//! What is exported: targets, their disks, and who may use them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use pss_gateway::peer::Network;
use pss_gateway::text::counted;

use crate::auth::{Account, Accounts, Algorithm};
use crate::keys::Wishes;
use crate::scsi::LunSettings;

/// Everything that is exported.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Catalog {
    /// Targets by name.
    pub targets: BTreeMap<String, Arc<TargetEntry>>,
    /// Who may ask for the list of targets.
    pub discovery: Accounts,
    /// What holds for discovery sessions.
    pub discovery_wishes: Wishes,
    /// CHAP algorithms, the preferred one first.
    pub algorithms: ChapAlgorithms,
    /// Addresses that initiators are told instead of those that connections come in on, as `host:port`.
    pub advertised: Vec<String>,
    /// Accounts that were made while running; a target uses them once they are bound to it.
    pub accounts: Vec<Account>,
}

impl Catalog {
    /// What there is, in a few words.
    pub fn summary(&self) -> String {
        let disks = self.targets.values().map(|target| target.luns.len());
        format!(
            "{} with {}",
            counted(self.targets.len(), "target"),
            counted(disks.sum(), "disk")
        )
    }
}

/// CHAP algorithms, the preferred one first.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ChapAlgorithms(pub Vec<Algorithm>);

impl Default for ChapAlgorithms {
    fn default() -> ChapAlgorithms {
        ChapAlgorithms(Algorithm::ALL.to_vec())
    }
}

/// A target.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetEntry {
    /// iSCSI name.
    pub name: String,
    /// For people.
    pub alias: Option<String>,
    /// Its disks, by LUN.
    pub luns: BTreeMap<u16, LunEntry>,
    /// CHAP.
    pub accounts: Accounts,
    /// Addresses of initiators that may use it; empty for all.
    pub addresses: Vec<Network>,
    /// Names of initiators that may use it, which may end in `*`; empty for all.
    pub initiators: Vec<String>,
    /// Without any rule it is for nobody instead of for all: a target made while running is closed until it
    /// is bound, and taking the last rule away opens nothing.
    pub closed: bool,
    /// What it wants in negotiations.
    pub wishes: Wishes,
    /// Where it is instead of here.
    pub redirect: Option<Redirect>,
    /// Whether new sessions are refused.
    pub offline: bool,
}

impl TargetEntry {
    /// A target without disks, open to everyone.
    pub fn new(name: &str) -> TargetEntry {
        TargetEntry {
            name: name.to_owned(),
            alias: None,
            luns: BTreeMap::new(),
            accounts: Accounts::default(),
            addresses: Vec::new(),
            initiators: Vec::new(),
            closed: false,
            wishes: Wishes::default(),
            redirect: None,
            offline: false,
        }
    }

    /// Whether it is for nobody.
    pub fn admits_nobody(&self) -> bool {
        self.closed && self.addresses.is_empty() && self.initiators.is_empty()
    }

    /// Whether an initiator's address may use it.
    pub fn admits_address(&self, address: IpAddr) -> bool {
        let networks = &self.addresses;
        if self.admits_nobody() {
            return false;
        }
        networks.is_empty() || networks.iter().any(|it| it.contains(address))
    }

    /// Whether a session that is there would be let in again, from all its addresses and with what it proved
    /// itself with.
    ///
    /// # Errors
    /// [`NotAdmitted`]: the rule that would not.
    pub fn admits_again(
        &self,
        initiator: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
        account: Option<&Account>,
    ) -> Result<(), NotAdmitted> {
        if !addresses.into_iter().all(|it| self.admits_address(it)) {
            return Err(NotAdmitted::Address);
        }
        if !self.admits_initiator(initiator) {
            return Err(NotAdmitted::Name);
        }
        if !self.accounts.required() {
            return Ok(());
        }
        let account = account.ok_or(NotAdmitted::Chap)?;
        let mut incoming = self.accounts.incoming.iter();
        match incoming.find(|it| it.name == account.name) {
            None => Err(NotAdmitted::Account),
            Some(it) if it.secret != account.secret => Err(NotAdmitted::Password),
            Some(_) => Ok(()),
        }
    }

    /// Whether an initiator of this name may use it. iSCSI names do not depend on case (RFC 7143 §4.2.7).
    pub fn admits_initiator(&self, name: &str) -> bool {
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => name
                .get(..start.len())
                .is_some_and(|head| head.eq_ignore_ascii_case(start)),
            None => pattern.eq_ignore_ascii_case(name),
        };
        self.initiators.is_empty() || self.initiators.iter().any(fits)
    }
}

/// Why a target would not let a session in again.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NotAdmitted {
    /// No rule for its address.
    #[error("initiator-address does not admit it")]
    Address,
    /// No rule for its name.
    #[error("initiator-name does not admit it")]
    Name,
    /// Other accounts only.
    #[error("its account is not one of the target's")]
    Account,
    /// The account has another secret.
    #[error("the password of its account is another one")]
    Password,
    /// It came without CHAP.
    #[error("CHAP is required, and it came without")]
    Chap,
}

impl NotAdmitted {
    /// Whether someone took its right away, instead of changing what it has to know at its next login.
    pub fn is_revoked(self) -> bool {
        matches!(
            self,
            NotAdmitted::Address | NotAdmitted::Name | NotAdmitted::Account
        )
    }
}

/// A disk of a target.
#[derive(Clone, Debug, PartialEq)]
pub struct LunEntry {
    /// Name of the volume.
    pub volume: String,
    /// How it is shown.
    pub settings: LunSettings,
}

/// Where a target is instead.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Redirect {
    /// `host:port`, with or without `,portal group`.
    pub address: String,
    /// Whether initiators may forget this address.
    pub permanent: bool,
}

/// A name that no target or initiator can have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BadName(pub String);

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no iSCSI name: iqn.YYYY-MM.DOMAIN[:NAME], eui. and 16 hexadecimal digits, or naa. \
             and 16 or 32 of them",
            self.0
        )
    }
}

impl std::error::Error for BadName {}

/// Checks an iSCSI name, and gives its normal form (RFC 7143 §4.2.7).
///
/// # Errors
/// [`BadName`].
pub fn normal_name(name: &str) -> Result<String, BadName> {
    let bad = || BadName(name.chars().take(223).collect());
    let lower = name.to_lowercase();
    let allowed = |it: char| it.is_ascii_alphanumeric() || "-.:".contains(it) || !it.is_ascii();
    if lower.len() > 223 || !lower.chars().all(allowed) {
        return Err(bad());
    }
    let hexadecimal = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let good = match lower.split_at_checked(4) {
        Some(("iqn.", rest)) => {
            let (date, domain) = rest.split_once('.').ok_or_else(bad)?;
            let digits = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
            let date = date.split_once('-').is_some_and(|(year, month)| {
                let month_is_good = month
                    .parse::<u8>()
                    .is_ok_and(|month| (1..=12).contains(&month));
                year.len() == 4 && digits(year) && month.len() == 2 && month_is_good
            });
            date && !domain.is_empty() && !domain.starts_with([':', '.'])
        }
        Some(("eui.", digits)) => digits.len() == 16 && hexadecimal(digits),
        Some(("naa.", digits)) => matches!(digits.len(), 16 | 32) && hexadecimal(digits),
        _ => false,
    };
    if good { Ok(lower) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Secret;

    #[test]
    fn names_of_three_kinds() {
        for good in [
            "iqn.2001-03.jp.tritech:tgtd-pss",
            "iqn.2001-04.com.example",
            "eui.02004567A425678D",
            "naa.52004567BA64678D",
            "naa.62004567BA64678D0123456789ABCDEF",
        ] {
            assert_eq!(normal_name(good), Ok(good.to_lowercase()));
        }
        for bad in [
            "",
            "iqn",
            "iqn.",
            "iqn.2001-13.com.example",
            "iqn.2001.com.example:x",
            "iqn.2001-03.",
            "iqn.2001-03.com.example:a b",
            "iqn.2001-03.com.example:a_b",
            "eui.123",
            "naa.zz004567BA64678D",
            "disk",
        ] {
            assert!(normal_name(bad).is_err(), "{bad}");
        }
        assert!(normal_name(&format!("iqn.2001-03.com:{}", "x".repeat(300))).is_err());
    }

    #[test]
    fn both_rules_must_admit() {
        let mut target = TargetEntry::new("iqn.2001-03.com.example:a");
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(target.admits_address(address("::1")) && target.admits_initiator("x"));
        target.addresses = vec!["10.0.0.0/8".parse().unwrap()];
        target.initiators = vec!["iqn.1994-05.com.redhat:*".into(), "iqn.x:Y".into()];
        assert!(target.admits_address(address("10.1.2.3")));
        assert!(!target.admits_address(address("11.1.2.3")));
        assert!(target.admits_initiator("iqn.1994-05.com.redhat:abc"));
        assert!(target.admits_initiator("IQN.X:y"));
        assert!(!target.admits_initiator("iqn.x:z"));
    }

    #[test]
    fn who_would_be_let_in_again() {
        let account = |name: &str, secret: &str| Account {
            name: name.to_owned(),
            secret: Secret::new(secret),
        };
        let here: IpAddr = "10.1.2.3".parse().unwrap();
        let mut target = TargetEntry::new("iqn.2001-03.com.example:a");
        let user = account("u", "one");
        let again = |target: &TargetEntry, account| target.admits_again("iqn.x", [here], account);
        assert_eq!(again(&target, None), Ok(()));
        assert_eq!(again(&target, Some(&user)), Ok(()));
        target.accounts.incoming = vec![account("v", "one"), account("u", "one")];
        assert_eq!(again(&target, Some(&user)), Ok(()));
        assert_eq!(again(&target, None), Err(NotAdmitted::Chap));
        target.accounts.incoming[1] = account("u", "two");
        assert_eq!(again(&target, Some(&user)), Err(NotAdmitted::Password));
        target.accounts.incoming.pop();
        assert_eq!(again(&target, Some(&user)), Err(NotAdmitted::Account));
        target.initiators = vec!["iqn.y".into()];
        assert_eq!(again(&target, Some(&user)), Err(NotAdmitted::Name));
        target.addresses = vec!["10.1.2.3".parse().unwrap()];
        assert_eq!(again(&target, Some(&user)), Err(NotAdmitted::Name));
        let two = [here, "10.1.2.4".parse().unwrap()];
        let answer = target.admits_again("iqn.y", two, Some(&user));
        assert_eq!(answer, Err(NotAdmitted::Address));
    }

    #[test]
    fn a_closed_target_is_for_nobody_until_it_has_a_rule() {
        let address = "10.1.2.3".parse().unwrap();
        let mut target = TargetEntry::new("iqn.2001-03.com.example:a");
        target.closed = true;
        assert!(target.admits_nobody() && !target.admits_address(address));
        target.initiators = vec!["iqn.x".into()];
        assert!(target.admits_address(address) && target.admits_initiator("iqn.x"));
    }
}
