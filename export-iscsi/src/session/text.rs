//! Text negotiation in the full feature phase (RFC 7143 §11.10): finding targets, mostly.

use crate::connection::TextExchange;
use crate::keys::{self, TEXT_BYTES_MAX, put};
use crate::pdu::request::TextRequest;
use crate::pdu::response::{Reason, text_response};
use crate::pdu::{Bhs, RESERVED_TAG};

use super::{Output, Session};

/// An initiator that keeps asking before it takes the answer gets no more.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Which targets an initiator wants to know (appendix C).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// All that it may use.
    All,
    /// This one.
    Named(String),
    /// That of its session.
    This,
}

impl Session {
    pub(super) fn handle_text(&mut self, cid: u16, request: TextRequest, data: &[u8], bhs: &Bhs) {
        let ttt = self.next_ttt();
        let Some(connection) = self.connections.get_mut(&cid) else {
            return;
        };
        if request.ttt == RESERVED_TAG {
            // A new exchange; what was left of another one is forgotten.
            connection.text = Some(TextExchange {
                ttt,
                ..TextExchange::default()
            });
        }
        let fits = |it: &&mut TextExchange| {
            let continues = request.ttt == RESERVED_TAG || it.ttt == request.ttt;
            continues
                && it.text.len() + data.len() <= TEXT_BYTES_MAX
                && it.answer.len() <= ANSWER_BYTES_MAX
        };
        let nonsense = request.last && request.continues;
        let Some(exchange) = connection.text.as_mut().filter(fits).filter(|_| !nonsense) else {
            connection.text = None;
            return self.reject(cid, bhs, Reason::InvalidField);
        };
        exchange.itt = request.common.itt;
        exchange.lun = request.lun;
        exchange.last = request.last;
        exchange.text.extend_from_slice(data);
        if request.continues {
            return self.answer_text(cid, true);
        }
        let text = std::mem::take(&mut exchange.text);
        match keys::parse(&text) {
            Ok(pairs) => self.answer_keys(cid, pairs),
            Err(_) => {
                connection.text = None;
                self.reject(cid, bhs, Reason::InvalidField);
            }
        }
    }

    fn answer_keys(&mut self, cid: u16, pairs: Vec<keys::Pair>) {
        let discovery = self.discovery;
        let mut wanted = None;
        let Some(connection) = self.connections.get_mut(&cid) else {
            return;
        };
        let mut answer = Vec::new();
        for keys::Pair { key, value } in pairs {
            match (key.as_str(), value.as_str()) {
                // "All ... MUST NOT be supported in an operational session" (appendix C).
                ("SendTargets", "All") if discovery => wanted = Some(Wanted::All),
                ("SendTargets", "") if !discovery => wanted = Some(Wanted::This),
                ("SendTargets", "All" | "") => put(&mut answer, &key, keys::REJECT),
                ("SendTargets", name) => wanted = Some(Wanted::Named(name.to_lowercase())),
                ("MaxRecvDataSegmentLength", value) => {
                    match keys::number(value, 512, (1 << 24) - 1) {
                        Some(bytes) => {
                            let most = self.params.data_bytes_max.max(512);
                            connection.sent_data_bytes_max = (bytes as usize).min(most);
                        }
                        None => put(&mut answer, &key, keys::REJECT),
                    }
                }
                ("InitiatorAlias", _) => {}
                _ if is_for_login(&key) => put(&mut answer, &key, keys::REJECT),
                _ => put(&mut answer, &key, keys::NOT_UNDERSTOOD),
            }
        }
        if let Some(exchange) = &mut connection.text {
            exchange.answer.extend_from_slice(&answer);
        }
        match wanted {
            Some(wanted) => self.outputs.push_back(Output::ListTargets { cid, wanted }),
            None => self.answer_text(cid, false),
        }
    }

    /// Targets as they were asked for: each name with its addresses as `host:port,group`.
    pub fn handle_targets(&mut self, cid: u16, targets: &[(String, Vec<String>)]) {
        let exchange = self
            .connections
            .get_mut(&cid)
            .and_then(|it| it.text.as_mut());
        let Some(exchange) = exchange else {
            return;
        };
        for (name, addresses) in targets {
            put(&mut exchange.answer, "TargetName", name);
            for address in addresses {
                put(&mut exchange.answer, "TargetAddress", address);
            }
        }
        self.answer_text(cid, false);
    }

    /// Sends what fits. `only_acknowledges` asks for the rest of the initiator's text.
    fn answer_text(&mut self, cid: u16, only_acknowledges: bool) {
        let numbers = self.window();
        let Some(connection) = self.connections.get_mut(&cid) else {
            return;
        };
        let most = connection.sent_data_bytes_max;
        let Some(exchange) = &mut connection.text else {
            return;
        };
        let length = match only_acknowledges {
            true => 0,
            false => exchange.answer.len().min(most),
        };
        let rest = exchange.answer.split_off(length);
        let text = std::mem::replace(&mut exchange.answer, rest);
        let continues = !only_acknowledges && !exchange.answer.is_empty();
        let last = exchange.last && !continues && !only_acknowledges;
        let ttt = if last { RESERVED_TAG } else { exchange.ttt };
        let bhs = text_response(exchange.itt, last, continues, exchange.lun, ttt);
        if last {
            connection.text = None;
        }
        connection.send_status(numbers, bhs, crate::connection::whole(text));
    }
}

fn is_for_login(key: &str) -> bool {
    matches!(
        key,
        "HeaderDigest"
            | "DataDigest"
            | "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "DefaultTime2Wait"
            | "DefaultTime2Retain"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "ErrorRecoveryLevel"
            | "InitiatorName"
            | "TargetName"
            | "SessionType"
            | "AuthMethod"
            | "TaskReporting"
    )
}
