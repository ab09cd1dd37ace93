//! Login (RFC 7143 §6): from the first byte of a connection to its full feature phase.
//!
//! Without IO: [`Login::handle_pdu`] takes what came, [`Login::poll_output`] says what is to be done. The
//! session that a connection becomes part of is the caller's: [`Output::Establish`] asks for it, and
//! [`Login::accept`] or [`Login::refuse`] answers.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;

use crate::auth::{Account, Challenges, Chap, ChapAnswer, ChapError};
use crate::catalog::{Catalog, NotAdmitted, Redirect, TargetEntry};
use crate::keys::{
    self, DEFAULT_DATA_BYTES, Negotiation, Pair, Params, TEXT_BYTES_MAX, TextError, put,
};
use crate::pdu::framing::Pdu;
use crate::pdu::request::{LoginRequest, Request};
use crate::pdu::response::{LoginResponse, LoginStatus, Numbers};
use crate::pdu::{Bhs, opcode};

/// Most login requests of one connection: more than any initiator needs, and an end to those that play.
const REQUESTS_MAX: usize = 128;
/// Longest name that is kept.
const NAME_BYTES_MAX: usize = 223;

const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// What a login depends on.
#[derive(Clone, Debug)]
pub struct Context {
    /// What is exported.
    pub catalog: Arc<Catalog>,
    /// Where the initiator is.
    pub peer: IpAddr,
    /// Where it connected to.
    pub local: SocketAddr,
    /// Of the portal.
    pub portal_group: u16,
    /// Challenges of this process.
    pub challenges: Arc<Challenges>,
}

/// Why a login was refused; says which rule refused it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a login.
    #[error("the first request is no login (opcode {0:#04x})")]
    NotLogin(u8),
    /// Header that cannot be.
    #[error("login request makes no sense: {0}")]
    BadRequest(&'static str),
    /// Text that cannot be.
    #[error("login text: {0}")]
    Text(#[from] TextError),
    /// A key that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{0}={1} cannot be")]
    BadValue(&'static str, String),
    /// A key that may not be there.
    #[error("{0} is not allowed in this stage")]
    NotAllowed(String),
    /// Not our version.
    #[error("the initiator speaks versions from {0} on, we speak 0")]
    Version(u8),
    /// No target of the name.
    #[error("there is no target {0:?}")]
    NoTarget(String),
    /// Address not admitted.
    #[error("initiator-address of target {target} does not admit {peer}")]
    Address {
        /// Which.
        target: String,
        /// From where.
        peer: IpAddr,
    },
    /// Name not admitted.
    #[error("initiator-name of target {target} does not admit {initiator}")]
    Name {
        /// Which.
        target: String,
        /// Who.
        initiator: String,
    },
    /// Target is elsewhere.
    #[error("target is at {} now", .0.address)]
    Moved(Redirect),
    /// Target takes no sessions.
    #[error("target {0} is offline")]
    Offline(String),
    /// CHAP failed.
    #[error("CHAP: {0}")]
    Chap(#[from] ChapError),
    /// CHAP was not done.
    #[error("the initiator does not want CHAP, which is required")]
    ChapRequired,
    /// Only methods that we do not have.
    #[error("AuthMethod={0} has no method that can be used: no account is configured")]
    NoMethod(String),
    /// A digest is required.
    #[error("{0} is required, and the initiator does not want it")]
    DigestRequired(&'static str),
    /// Too many requests.
    #[error("login took more than {REQUESTS_MAX} requests")]
    TooLong,
    /// The session said no.
    #[error("{0}")]
    Session(SessionRefusal),
}

/// Why a connection cannot be part of a session.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SessionRefusal {
    /// No such session.
    #[error("there is no such session")]
    DoesNotExist,
    /// The session is someone else's.
    #[error("the session is of another initiator or target")]
    NotYours,
    /// It has all its connections.
    #[error("the session has all its connections")]
    TooManyConnections,
    /// No room for another session.
    #[error("too many sessions")]
    TooManySessions,
    /// The target's disks are not open yet.
    #[error("the target's volumes are not open yet")]
    NotReady,
    /// The server stops.
    #[error("the server stops")]
    Stopping,
    /// The rules changed while it logged in.
    #[error("the target was changed: {0}")]
    NotAdmitted(#[from] NotAdmitted),
}

impl Refusal {
    /// What the initiator is told.
    pub fn status(&self) -> LoginStatus {
        match self {
            Refusal::NotLogin(_) => LoginStatus::InvalidDuringLogin,
            Refusal::BadRequest(_)
            | Refusal::Text(_)
            | Refusal::BadValue(..)
            | Refusal::NotAllowed(_)
            | Refusal::TooLong
            | Refusal::DigestRequired(_) => LoginStatus::InitiatorError,
            Refusal::Missing(_) => LoginStatus::MissingParameter,
            Refusal::Version(_) => LoginStatus::UnsupportedVersion,
            Refusal::NoTarget(_) => LoginStatus::NotFound,
            Refusal::Address { .. } | Refusal::Name { .. } => LoginStatus::AuthorizationFailure,
            Refusal::Moved(redirect) if redirect.permanent => LoginStatus::MovedPermanently,
            Refusal::Moved(_) => LoginStatus::MovedTemporarily,
            Refusal::Offline(_) => LoginStatus::ServiceUnavailable,
            Refusal::Chap(_) | Refusal::ChapRequired | Refusal::NoMethod(_) => {
                LoginStatus::AuthenticationFailure
            }
            Refusal::Session(refusal) => match refusal {
                SessionRefusal::DoesNotExist => LoginStatus::SessionDoesNotExist,
                SessionRefusal::NotYours => LoginStatus::CannotInclude,
                SessionRefusal::TooManyConnections => LoginStatus::TooManyConnections,
                SessionRefusal::TooManySessions => LoginStatus::OutOfResources,
                SessionRefusal::NotReady | SessionRefusal::Stopping => {
                    LoginStatus::ServiceUnavailable
                }
                SessionRefusal::NotAdmitted(_) => LoginStatus::AuthorizationFailure,
            },
        }
    }
}

/// A connection that may enter the full feature phase.
#[derive(Clone, Debug)]
pub struct Established {
    /// Who.
    pub initiator_name: String,
    /// For people.
    pub initiator_alias: String,
    /// The target, or none in a discovery session.
    pub target: Option<Arc<TargetEntry>>,
    /// Initiator's part of the session id.
    pub isid: [u8; 6],
    /// The session to add it to, or 0 for a new one.
    pub tsih: u16,
    /// Connection id.
    pub cid: u16,
    /// What was agreed on.
    pub params: Params,
    /// The first command's number.
    pub cmd_sn: u32,
    /// What it proved itself with, if CHAP was done.
    pub account: Option<Account>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Output {
    /// Send this header and text.
    Send(Bhs, Bytes),
    /// Find the session, and call [`Login::accept`] or [`Login::refuse`].
    Establish(Box<Established>),
    /// Close the connection, after what was to be sent.
    Close(Refusal),
}

/// A connection's login.
#[derive(Debug)]
pub struct Login {
    context: Context,
    outputs: VecDeque<Output>,
    requests: usize,
    stage: u8,
    first: Option<LoginRequest>,
    /// The request that is being answered.
    current: Option<LoginRequest>,
    stat_sn: u32,
    /// Text of requests with the C bit.
    text: Vec<u8>,
    /// What did not fit into the response.
    unsent: Vec<u8>,
    /// The transition that waits until all is sent.
    leaves_for: Option<u8>,
    identity: Option<Identity>,
    security: Security,
    negotiation: Option<Negotiation>,
    declared: bool,
    ended: bool,
}

#[derive(Clone, Debug)]
struct Identity {
    initiator_name: String,
    initiator_alias: String,
    session_type: Option<String>,
    target_name: Option<String>,
    target: Option<Arc<TargetEntry>>,
}

#[derive(Debug)]
enum Security {
    /// Nothing said.
    Start,
    /// CHAP was agreed on.
    Chosen,
    /// The initiator was asked.
    Asked(Chap),
    /// Done: the CHAP user.
    Done(Option<Account>),
}

impl Login {
    /// A connection that was just accepted.
    pub fn new(context: Context) -> Login {
        Login {
            context,
            outputs: VecDeque::new(),
            requests: 0,
            stage: SECURITY,
            first: None,
            current: None,
            stat_sn: 0,
            text: Vec::new(),
            unsent: Vec::new(),
            leaves_for: None,
            identity: None,
            security: Security::Start,
            negotiation: None,
            declared: false,
            ended: false,
        }
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether no more requests are taken.
    pub fn is_over(&self) -> bool {
        self.ended
    }

    /// The initiator, as far as it said who it is.
    pub fn initiator(&self) -> &str {
        self.identity.as_ref().map_or("", |it| &it.initiator_name)
    }

    /// Takes a PDU.
    pub fn handle_pdu(&mut self, pdu: &Pdu) {
        if self.ended {
            return;
        }
        let request = match Request::decode(&pdu.bhs, &pdu.ahs) {
            Ok(Request::Login(request)) => request,
            _ => {
                let refusal = Refusal::NotLogin(pdu.bhs[0] & opcode::MASK);
                return match self.current {
                    Some(_) => self.fail(refusal),
                    None => self.close(refusal),
                };
            }
        };
        self.current = Some(request);
        if let Err(refusal) = self.handle_request(request, &pdu.data) {
            self.fail(refusal);
        }
    }

    /// The session takes the connection: the last response.
    pub fn accept(&mut self, tsih: u16, exp_cmd_sn: u32, max_cmd_sn: u32) {
        let request = self.current.expect("accepted after a request");
        let text = std::mem::take(&mut self.unsent);
        let response = LoginResponse {
            transit: true,
            continues: false,
            current_stage: self.stage,
            next_stage: FULL_FEATURE,
            isid: request.isid,
            tsih,
            itt: request.common.itt,
            status: LoginStatus::Success,
        };
        let numbers = self.next_numbers(exp_cmd_sn, max_cmd_sn);
        let bhs = response.encode(numbers);
        self.outputs.push_back(Output::Send(bhs, text.into()));
        self.ended = true;
    }

    /// The session does not take the connection.
    pub fn refuse(&mut self, refusal: SessionRefusal) {
        self.unsent.clear();
        self.fail(Refusal::Session(refusal));
    }

    /// The number of the first status after the login.
    pub fn next_stat_sn(&self) -> u32 {
        self.stat_sn
    }

    fn next_numbers(&mut self, exp_cmd_sn: u32, max_cmd_sn: u32) -> Numbers {
        let stat_sn = self.stat_sn;
        self.stat_sn = stat_sn.wrapping_add(1);
        Numbers {
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
        }
    }

    fn close(&mut self, refusal: Refusal) {
        self.ended = true;
        self.outputs.push_back(Output::Close(refusal));
    }

    fn fail(&mut self, refusal: Refusal) {
        let mut text = Vec::new();
        if let Refusal::Moved(redirect) = &refusal {
            put(&mut text, "TargetAddress", &redirect.address);
        }
        if let Some(request) = self.current {
            let response = LoginResponse {
                transit: false,
                continues: false,
                current_stage: request.current_stage,
                next_stage: 0,
                isid: request.isid,
                tsih: request.tsih,
                itt: request.common.itt,
                status: refusal.status(),
            };
            let cmd_sn = request.common.cmd_sn;
            let numbers = self.next_numbers(cmd_sn, cmd_sn);
            let bhs = response.encode(numbers);
            self.outputs.push_back(Output::Send(bhs, text.into()));
        }
        self.close(refusal);
    }

    fn handle_request(&mut self, request: LoginRequest, data: &[u8]) -> Result<(), Refusal> {
        self.check(&request)?;
        if !self.unsent.is_empty() || self.leaves_for.is_some() {
            // The initiator asks for the rest of a long answer.
            if !data.is_empty() {
                return Err(Refusal::BadRequest("text before the answer was complete"));
            }
            return self.respond();
        }
        if self.text.len() + data.len() > TEXT_BYTES_MAX {
            return Err(TextError::TooMuch.into());
        }
        self.text.extend_from_slice(data);
        if request.continues {
            // "answer a Login Request with the C bit with a Login Response with no text" (§6.2).
            self.send(false, Vec::new());
            return Ok(());
        }
        let text = std::mem::take(&mut self.text);
        let pairs = keys::parse(&text)?;
        self.answer(&request, pairs)?;
        self.respond()
    }

    fn check(&mut self, request: &LoginRequest) -> Result<(), Refusal> {
        self.requests += 1;
        if self.requests > REQUESTS_MAX {
            return Err(Refusal::TooLong);
        }
        if request.version_min > 0 {
            return Err(Refusal::Version(request.version_min));
        }
        match &self.first {
            None => {
                self.first = Some(*request);
                self.stat_sn = request.common.exp_stat_sn;
                self.stage = request.current_stage;
            }
            Some(first) => {
                let same = |it: &LoginRequest| (it.isid, it.tsih, it.cid);
                if same(first) != same(request) {
                    return Err(Refusal::BadRequest("ISID, TSIH or CID changed"));
                }
            }
        }
        if !matches!(request.current_stage, SECURITY | OPERATIONAL) {
            return Err(Refusal::BadRequest("no such stage"));
        }
        if request.current_stage != self.stage {
            return Err(Refusal::BadRequest(
                "not the stage that the connection is in",
            ));
        }
        if request.transit && request.continues {
            return Err(Refusal::BadRequest("both T and C are set"));
        }
        let goes_on = matches!(request.next_stage, OPERATIONAL | FULL_FEATURE)
            && request.next_stage > request.current_stage;
        if request.transit && !goes_on {
            return Err(Refusal::BadRequest("no such next stage"));
        }
        Ok(())
    }

    /// Answers complete text, and decides whether the stage ends.
    fn answer(&mut self, request: &LoginRequest, pairs: Vec<Pair>) -> Result<(), Refusal> {
        let pairs = self.identify(pairs)?;
        match self.stage {
            SECURITY => self.answer_security(&pairs)?,
            _ => self.answer_operational(&pairs)?,
        }
        // T may be set by initiators all through CHAP: it ends when it is done.
        let may_leave = self.stage != SECURITY || matches!(self.security, Security::Done(_));
        if request.transit && may_leave {
            self.leaves_for = Some(request.next_stage);
        }
        Ok(())
    }

    /// Takes who and what from the first text; gives the keys that are left.
    fn identify(&mut self, pairs: Vec<Pair>) -> Result<Vec<Pair>, Refusal> {
        let mut said = self.identity.clone().unwrap_or(Identity {
            initiator_name: String::new(),
            initiator_alias: String::new(),
            session_type: None,
            target_name: None,
            target: None,
        });
        let again = self.identity.is_some();
        let mut left = Vec::new();
        let mut seen = Vec::new();
        for pair in pairs {
            let value = pair.value.clone();
            let changed = match pair.key.as_str() {
                "InitiatorName" => {
                    let old = std::mem::replace(&mut said.initiator_name, value);
                    (again || seen.contains(&pair.key)) && old != said.initiator_name
                }
                "InitiatorAlias" => {
                    said.initiator_alias = value.chars().take(NAME_BYTES_MAX).collect();
                    false
                }
                "SessionType" => {
                    let old = said.session_type.replace(value);
                    (again || old.is_some()) && old != said.session_type
                }
                "TargetName" => {
                    let old = said.target_name.replace(value);
                    (again || old.is_some()) && old != said.target_name
                }
                _ => {
                    left.push(pair);
                    continue;
                }
            };
            if changed {
                return Err(TextError::Repeated(pair.key).into());
            }
            seen.push(pair.key);
        }
        if !again {
            self.admit(&mut said)?;
            self.greet(&said);
        }
        self.identity = Some(said);
        Ok(left)
    }

    /// Whether this initiator may use what it names.
    fn admit(&self, said: &mut Identity) -> Result<(), Refusal> {
        let initiator = &said.initiator_name;
        if initiator.is_empty() {
            return Err(Refusal::Missing("InitiatorName"));
        }
        if initiator.len() > NAME_BYTES_MAX {
            let shown = initiator.chars().take(NAME_BYTES_MAX).collect();
            return Err(Refusal::BadValue("InitiatorName", shown));
        }
        match said.session_type.as_deref() {
            // "The default is Normal" (§13.21).
            None | Some("Normal") => {}
            Some("Discovery") => return Ok(()),
            Some(other) => {
                let shown = other.chars().take(80).collect();
                return Err(Refusal::BadValue("SessionType", shown));
            }
        }
        let name = said.target_name.as_deref();
        let name = name.ok_or(Refusal::Missing("TargetName"))?;
        let shown = || name.chars().take(NAME_BYTES_MAX).collect::<String>();
        let targets = &self.context.catalog.targets;
        let target = targets.get(&name.to_lowercase());
        let target = target.ok_or_else(|| Refusal::NoTarget(shown()))?;
        let peer = self.context.peer;
        if !target.admits_address(peer) {
            let target = target.name.clone();
            return Err(Refusal::Address { target, peer });
        }
        if !target.admits_initiator(initiator) {
            return Err(Refusal::Name {
                target: target.name.clone(),
                initiator: initiator.clone(),
            });
        }
        if let Some(redirect) = &target.redirect {
            return Err(Refusal::Moved(redirect.clone()));
        }
        if target.offline {
            return Err(Refusal::Offline(target.name.clone()));
        }
        said.target = Some(Arc::clone(target));
        Ok(())
    }

    /// What the target says about itself in its first answer.
    fn greet(&mut self, said: &Identity) {
        let leading = self.first.is_some_and(|first| first.tsih == 0);
        if let Some(target) = &said.target {
            if let Some(alias) = &target.alias {
                put(&mut self.unsent, "TargetAlias", alias);
            }
            // "MUST be returned ... in the first Login Response" of a normal session (§13.9).
            if leading {
                let tag = self.context.portal_group.to_string();
                put(&mut self.unsent, "TargetPortalGroupTag", &tag);
            }
        }
    }

    fn target(&self) -> Option<&Arc<TargetEntry>> {
        self.identity.as_ref()?.target.as_ref()
    }

    fn answer_security(&mut self, pairs: &[Pair]) -> Result<(), Refusal> {
        let catalog = Arc::clone(&self.context.catalog);
        let target = self.target().cloned();
        let accounts = match &target {
            Some(target) => &target.accounts,
            None => &catalog.discovery,
        };
        let mut answer = ChapAnswer::default();
        let mut offered = None;
        for Pair { key, value } in pairs {
            match (key.as_str(), &self.security) {
                ("AuthMethod", Security::Start) => {
                    let method = self.choose_method(value, accounts.required())?;
                    put(&mut self.unsent, key, method);
                }
                ("AuthMethod", _) => return Err(TextError::Repeated(key.clone()).into()),
                ("CHAP_A", Security::Chosen) => offered = Some(value.as_str()),
                ("CHAP_N", Security::Asked(_)) => answer.name = Some(value),
                ("CHAP_R", Security::Asked(_)) => answer.response = Some(value),
                ("CHAP_I", Security::Asked(_)) => answer.id = Some(value),
                ("CHAP_C", Security::Asked(_)) => answer.challenge = Some(value),
                ("CHAP_A" | "CHAP_N" | "CHAP_R" | "CHAP_I" | "CHAP_C", _) => {
                    return Err(Refusal::NotAllowed(key.clone()));
                }
                _ if is_operational(key) => return Err(Refusal::NotAllowed(key.clone())),
                _ => put(&mut self.unsent, key, keys::NOT_UNDERSTOOD),
            }
        }
        if let Some(offered) = offered {
            let algorithms = &catalog.algorithms.0;
            let chap = Chap::start(offered, algorithms, &self.context.challenges)?;
            for (key, value) in chap.question() {
                put(&mut self.unsent, key, &value);
            }
            self.security = Security::Asked(chap);
            return Ok(());
        }
        match &self.security {
            Security::Asked(chap) if answer.name.is_some() || answer.response.is_some() => {
                let challenges = &self.context.challenges;
                let (account, ours) = chap.verify(answer, accounts, challenges)?;
                if let Some((name, response)) = ours {
                    put(&mut self.unsent, "CHAP_N", &name);
                    put(&mut self.unsent, "CHAP_R", &response);
                }
                self.security = Security::Done(Some(account));
            }
            Security::Start if !accounts.required() => {}
            Security::Start if self.wants_to_leave() => return Err(Refusal::ChapRequired),
            _ => {}
        }
        if matches!(self.security, Security::Start) && !accounts.required() && self.wants_to_leave()
        {
            // Nobody said anything about authentication, and nobody has to.
            self.security = Security::Done(None);
        }
        Ok(())
    }

    fn wants_to_leave(&self) -> bool {
        self.current.is_some_and(|request| request.transit)
    }

    fn choose_method(&mut self, offered: &str, required: bool) -> Result<&'static str, Refusal> {
        let mut methods = offered.split(',').map(str::trim);
        let wanted = if required { "CHAP" } else { "None" };
        if !methods.any(|method| method == wanted) {
            let shown = offered.chars().take(80).collect();
            return Err(match required {
                true => Refusal::ChapRequired,
                false => Refusal::NoMethod(shown),
            });
        }
        self.security = match required {
            true => Security::Chosen,
            false => Security::Done(None),
        };
        Ok(wanted)
    }

    fn answer_operational(&mut self, pairs: &[Pair]) -> Result<(), Refusal> {
        let accounts = match self.target() {
            Some(target) => &target.accounts,
            None => &self.context.catalog.discovery,
        };
        if accounts.required() && !matches!(self.security, Security::Done(Some(_))) {
            return Err(Refusal::ChapRequired);
        }
        let security_key = |pair: &&Pair| pair.key == "AuthMethod" || pair.key.starts_with("CHAP_");
        if let Some(pair) = pairs.iter().find(security_key) {
            return Err(Refusal::NotAllowed(pair.key.clone()));
        }
        let sent_targets = |pair: &&Pair| pair.key == "SendTargets";
        if let Some(pair) = pairs.iter().find(sent_targets) {
            return Err(Refusal::NotAllowed(pair.key.clone()));
        }
        let wishes = self.wishes();
        let declared = wishes.data_bytes_max;
        let negotiation = self
            .negotiation
            .get_or_insert_with(|| Negotiation::new(wishes));
        negotiation.answer(pairs, &mut self.unsent)?;
        if !self.declared {
            self.declared = true;
            let bytes = declared.to_string();
            put(&mut self.unsent, "MaxRecvDataSegmentLength", &bytes);
        }
        Ok(())
    }

    fn wishes(&self) -> keys::Wishes {
        match self.target() {
            Some(target) => target.wishes.clone(),
            None => self.context.catalog.discovery_wishes.clone(),
        }
    }

    /// Sends what fits, and leaves the stage when all is sent.
    fn respond(&mut self) -> Result<(), Refusal> {
        if self.unsent.len() > DEFAULT_DATA_BYTES {
            let rest = self.unsent.split_off(DEFAULT_DATA_BYTES);
            let text = std::mem::replace(&mut self.unsent, rest);
            self.send(true, text);
            return Ok(());
        }
        if self.leaves_for == Some(FULL_FEATURE) {
            return self.establish();
        }
        let text = std::mem::take(&mut self.unsent);
        self.send(false, text);
        Ok(())
    }

    fn send(&mut self, continues: bool, text: Vec<u8>) {
        let request = self.current.expect("answers a request");
        let next = match continues {
            true => None,
            false => self.leaves_for.take(),
        };
        let response = LoginResponse {
            transit: next.is_some(),
            continues,
            current_stage: self.stage,
            next_stage: next.unwrap_or(0),
            isid: request.isid,
            tsih: request.tsih,
            itt: request.common.itt,
            status: LoginStatus::Success,
        };
        let cmd_sn = request.common.cmd_sn;
        let numbers = self.next_numbers(cmd_sn, cmd_sn);
        let bhs = response.encode(numbers);
        self.outputs.push_back(Output::Send(bhs, text.into()));
        self.stage = next.unwrap_or(self.stage);
    }

    fn establish(&mut self) -> Result<(), Refusal> {
        let (Some(first), Some(said)) = (self.first, self.identity.clone()) else {
            return Err(Refusal::Missing("InitiatorName"));
        };
        let wishes = self.wishes();
        let negotiation = self
            .negotiation
            .get_or_insert_with(|| Negotiation::new(wishes));
        let params = negotiation.finish().map_err(Refusal::DigestRequired)?;
        let account = match &self.security {
            Security::Done(account) => account.clone(),
            _ => None,
        };
        let established = Established {
            initiator_name: said.initiator_name,
            initiator_alias: said.initiator_alias,
            target: said.target,
            isid: first.isid,
            tsih: first.tsih,
            cid: first.cid,
            params,
            cmd_sn: first.common.cmd_sn,
            account,
        };
        let output = Output::Establish(Box::new(established));
        self.outputs.push_back(output);
        Ok(())
    }
}

/// Keys that are for the operational stage only (§13, "Use: LO" or "ALL", not in the security stage).
fn is_operational(key: &str) -> bool {
    matches!(
        key,
        "HeaderDigest"
            | "DataDigest"
            | "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxRecvDataSegmentLength"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "DefaultTime2Wait"
            | "DefaultTime2Retain"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "ErrorRecoveryLevel"
            | "SendTargets"
    )
}

#[cfg(test)]
mod tests;
