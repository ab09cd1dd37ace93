use super::*;
use crate::auth::{Account, Accounts, Algorithm, Secret, binary, hexadecimal};
use crate::pdu::request::{Common, encode_whole};
use crate::pdu::{CONTINUE, FINAL, word};
use bytes::BytesMut;
use proptest::prelude::*;

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
const NAMES: &str =
    "InitiatorName=iqn.1994-05.com.redhat:me TargetName=iqn.2001-03.jp.tritech:tgtd-pss";

fn account(name: &str, secret: &str) -> Account {
    Account {
        name: name.to_owned(),
        secret: Secret::new(secret),
    }
}

fn catalog(change: impl FnOnce(&mut TargetEntry)) -> Catalog {
    let mut target = TargetEntry::new(TARGET);
    change(&mut target);
    Catalog {
        targets: [(TARGET.to_owned(), Arc::new(target))].into(),
        ..Catalog::default()
    }
}

fn with_chap(target: &mut TargetEntry) {
    target.accounts = Accounts {
        incoming: vec![account("iscsi_pss", "iscsi_pss000")],
        outgoing: Some(account("target", "target secret")),
    };
}

fn login(catalog: Catalog) -> Login {
    Login::new(Context {
        catalog: Arc::new(catalog),
        peer: "10.0.0.7".parse().unwrap(),
        local: "10.0.0.1:3260".parse().unwrap(),
        portal_group: 3,
        challenges: Arc::default(),
    })
}

/// A request with flags as in byte 1.
fn request(flags: u8) -> LoginRequest {
    LoginRequest {
        common: Common {
            immediate: true,
            itt: 77,
            cmd_sn: 1000,
            exp_stat_sn: 500,
        },
        transit: flags & FINAL != 0,
        continues: flags & CONTINUE != 0,
        current_stage: flags >> 2 & 3,
        next_stage: flags & 3,
        version_max: 0,
        version_min: 0,
        isid: [0x40, 0, 0, 1, 2, 3],
        tsih: 0,
        cid: 0,
    }
}

fn pdu_of(request: &Request, data: &[u8]) -> Pdu {
    let mut input = BytesMut::from(&encode_whole(request, data)[..]);
    let mut framing = crate::pdu::framing::Framing::new(1 << 20);
    framing.poll(&mut input).unwrap().unwrap()
}

fn send_raw(login: &mut Login, flags: u8, data: &[u8]) -> Vec<Output> {
    login.handle_pdu(&pdu_of(&Request::Login(request(flags)), data));
    std::iter::from_fn(|| login.poll_output()).collect()
}

/// Keys are separated by blanks here.
fn send(login: &mut Login, flags: u8, text: &str) -> Vec<Output> {
    let mut data = text.replace(' ', "\0").into_bytes();
    data.push(0);
    send_raw(login, flags, &data)
}

/// Byte 1 and text of the only answer.
fn answer(outputs: &[Output]) -> (u8, String) {
    let [Output::Send(bhs, text)] = outputs else {
        panic!("one answer, not {outputs:?}");
    };
    assert_eq!(&bhs[36..38], [0, 0]);
    let text = String::from_utf8(text.to_vec()).unwrap();
    (bhs[1], text.replace('\0', " ").trim().to_owned())
}

fn established(outputs: Vec<Output>) -> Established {
    match outputs.into_iter().next() {
        Some(Output::Establish(established)) => *established,
        other => panic!("established, not {other:?}"),
    }
}

fn refused(outputs: &[Output]) -> (LoginStatus, String) {
    let [Output::Send(bhs, _), Output::Close(refusal)] = outputs else {
        panic!("refused, not {outputs:?}");
    };
    let status = u16::from_be_bytes([bhs[36], bhs[37]]);
    assert_eq!(status, refusal.status() as u16);
    (refusal.status(), refusal.to_string())
}

#[test]
fn straight_to_full_feature() {
    let mut login = login(catalog(|_| {}));
    let offers = format!("{NAMES} HeaderDigest=CRC32C,None InitialR2T=No");
    let done = established(send(&mut login, 0x87, &offers));
    assert_eq!(done.initiator_name, "iqn.1994-05.com.redhat:me");
    assert_eq!(done.target.unwrap().name, TARGET);
    assert!(done.params.header_digest && !done.params.initial_r2t);
    assert_eq!((done.cmd_sn, done.tsih, done.account), (1000, 0, None));
    login.accept(9, 1000, 1127);
    let Some(Output::Send(bhs, text)) = login.poll_output() else {
        panic!("the last response");
    };
    let text = String::from_utf8_lossy(&text).replace('\0', " ");
    assert_eq!(
        text.trim(),
        "TargetPortalGroupTag=3 HeaderDigest=CRC32C InitialR2T=No MaxRecvDataSegmentLength=1048576"
    );
    assert_eq!((bhs[1], &bhs[14..16]), (0x87, &[0u8, 9][..]));
    assert_eq!(
        (word(&bhs, 24), word(&bhs, 28), word(&bhs, 32)),
        (500, 1000, 1127)
    );
    assert_eq!(login.next_stat_sn(), 501);
}

#[test]
fn security_then_operational() {
    let mut login = login(catalog(|_| {}));
    let (flags, text) = answer(&send(
        &mut login,
        0x81,
        &format!("{NAMES} AuthMethod=CHAP,None"),
    ));
    assert_eq!(
        (flags, &*text),
        (0x81, "TargetPortalGroupTag=3 AuthMethod=None")
    );
    let (flags, text) = answer(&send(&mut login, 0x04, "MaxBurstLength=262144"));
    assert_eq!(flags, 0x04);
    assert_eq!(
        text,
        "MaxBurstLength=262144 MaxRecvDataSegmentLength=1048576"
    );
    established(send(&mut login, 0x87, ""));
}

#[test]
fn absent_session_type_means_normal_and_keys_come_in_any_order() {
    // RFC 7143 §13.21.
    let mut login = login(catalog(|_| {}));
    let text = format!("MaxConnections=1 TargetName={TARGET} X-foo=1 InitiatorName=iqn.a.b");
    assert!(established(send(&mut login, 0x87, &text)).target.is_some());
}

#[test]
fn text_over_many_pdus_split_at_every_byte() {
    let text = format!("{NAMES} SessionType=Normal InitialR2T=Yes").replace(' ', "\0") + "\0";
    for cut in 0..=text.len() {
        let mut login = login(catalog(|_| {}));
        let (first, second) = text.as_bytes().split_at(cut);
        let (flags, said) = answer(&send_raw(&mut login, 0x44, first));
        // "MUST answer with a Login Response with no text" and without T.
        assert_eq!((flags, &*said), (0x04, ""));
        established(send_raw(&mut login, 0x87, second));
    }
}

#[test]
fn discovery_needs_no_target() {
    let mut login = login(catalog(with_chap));
    let text = "InitiatorName=iqn.a.b SessionType=Discovery";
    let done = established(send(&mut login, 0x87, text));
    assert!(done.target.is_none());
}

#[test]
fn discovery_with_accounts_needs_chap() {
    let mut catalog = catalog(|_| {});
    catalog.discovery.incoming = vec![account("d", "discovery secret")];
    let mut login = login(catalog);
    let text = "InitiatorName=iqn.a.b SessionType=Discovery";
    let (status, _) = refused(&send(&mut login, 0x87, text));
    assert_eq!(status, LoginStatus::AuthenticationFailure);
}

fn respond(question: &str, secret: &str) -> (String, u8) {
    let value = |key: &str| {
        let found = question.split(' ').find_map(|pair| pair.strip_prefix(key));
        found.unwrap().to_owned()
    };
    let algorithm = match &*value("CHAP_A=") {
        "5" => Algorithm::Md5,
        "7" => Algorithm::Sha256,
        "8" => Algorithm::Sha3,
        other => panic!("algorithm {other}"),
    };
    let id = value("CHAP_I=").parse().unwrap();
    let challenge = binary(&value("CHAP_C=")).unwrap();
    let response = algorithm.response(id, &Secret::new(secret), &challenge);
    (hexadecimal(&response), algorithm as u8)
}

#[test]
fn chap_one_way() {
    let mut login = login(catalog(with_chap));
    let (flags, text) = answer(&send(
        &mut login,
        0x00,
        &format!("{NAMES} AuthMethod=CHAP,None"),
    ));
    assert_eq!(
        (flags, &*text),
        (0, "TargetPortalGroupTag=3 AuthMethod=CHAP")
    );
    let (flags, question) = answer(&send(&mut login, 0x00, "CHAP_A=5,7"));
    assert_eq!(flags, 0);
    let (response, algorithm) = respond(&question, "iscsi_pss000");
    assert_eq!(algorithm, 7);
    let reply = format!("CHAP_N=iscsi_pss CHAP_R={response}");
    assert_eq!(answer(&send(&mut login, 0x81, &reply)).0, 0x81);
    let done = established(send(&mut login, 0x87, ""));
    assert_eq!(done.account.unwrap().name, "iscsi_pss");
}

#[test]
fn chap_with_t_on_every_step_as_ipxe_has_it() {
    let mut login = login(catalog(with_chap));
    let (flags, _) = answer(&send(&mut login, 0x81, &format!("{NAMES} AuthMethod=CHAP")));
    assert_eq!(flags, 0);
    let (flags, question) = answer(&send(&mut login, 0x81, "CHAP_A=5"));
    assert_eq!(flags, 0);
    let (response, _) = respond(&question, "iscsi_pss000");
    let reply = format!("CHAP_N=iscsi_pss CHAP_R={response} CHAP_I=3 CHAP_C=0x010203");
    let (flags, proof) = answer(&send(&mut login, 0x81, &reply));
    let expected = Algorithm::Md5.response(3, &Secret::new("target secret"), &[1, 2, 3]);
    // Our proof comes with, not after, the end of the stage.
    assert_eq!(flags, 0x81);
    assert_eq!(
        proof,
        format!("CHAP_N=target CHAP_R={}", hexadecimal(&expected))
    );
}

#[test]
fn chap_failures_say_which_rule() {
    let mut one = login(catalog(with_chap));
    send(&mut one, 0x00, &format!("{NAMES} AuthMethod=CHAP"));
    let (_, question) = answer(&send(&mut one, 0x00, "CHAP_A=5"));
    let (response, _) = respond(&question, "not the secret");
    let reply = format!("CHAP_N=iscsi_pss CHAP_R={response}");
    let (status, why) = refused(&send(&mut one, 0x81, &reply));
    assert_eq!(status, LoginStatus::AuthenticationFailure);
    assert_eq!(why, "CHAP: user \"iscsi_pss\" has another secret");

    for (offer, flags) in [
        ("AuthMethod=None", 0x81),
        ("", 0x81),
        ("AuthMethod=KRB5", 0),
    ] {
        let mut login = login(catalog(with_chap));
        let (status, _) = refused(&send(&mut login, flags, &format!("{NAMES} {offer}")));
        assert_eq!(status, LoginStatus::AuthenticationFailure, "{offer}");
    }
    let mut two = login(catalog(with_chap));
    send(&mut two, 0x00, &format!("{NAMES} AuthMethod=CHAP"));
    let (status, why) = refused(&send(&mut two, 0x00, "CHAP_A=99"));
    assert_eq!(status, LoginStatus::AuthenticationFailure);
    assert!(why.contains("CHAP_A=99"), "{why}");
}

#[test]
fn security_cannot_be_skipped() {
    let mut login = login(catalog(with_chap));
    let (status, _) = refused(&send(&mut login, 0x87, NAMES));
    assert_eq!(status, LoginStatus::AuthenticationFailure);
    let mut login = super::tests::login(catalog(with_chap));
    // Nor by asking and then jumping.
    send(&mut login, 0x00, &format!("{NAMES} AuthMethod=CHAP"));
    let (flags, _) = answer(&send(&mut login, 0x83, ""));
    assert_eq!(flags, 0);
    let (status, _) = refused(&send(&mut login, 0x87, ""));
    assert_eq!(status, LoginStatus::InitiatorError);
}

#[test]
fn refusals_have_the_right_status() {
    let address = |target: &mut TargetEntry| {
        target.addresses = vec!["192.168.0.0/16".parse().unwrap()];
    };
    let name = |target: &mut TargetEntry| target.initiators = vec!["iqn.other".into()];
    let moved = |target: &mut TargetEntry| {
        target.redirect = Some(Redirect {
            address: "10.0.0.2:3260".into(),
            permanent: false,
        });
    };
    let nothing = |_: &mut TargetEntry| {};
    type Change = fn(&mut TargetEntry);
    let cases: [(Change, &str, LoginStatus); 9] = [
        (nothing, "TargetName=iqn.x", LoginStatus::MissingParameter),
        (
            nothing,
            "InitiatorName=iqn.x",
            LoginStatus::MissingParameter,
        ),
        (
            nothing,
            "InitiatorName=a TargetName=iqn.nobody",
            LoginStatus::NotFound,
        ),
        (
            nothing,
            "InitiatorName=a SessionType=Odd",
            LoginStatus::InitiatorError,
        ),
        (
            nothing,
            "InitiatorName=a InitiatorName=b",
            LoginStatus::InitiatorError,
        ),
        (address, NAMES, LoginStatus::AuthorizationFailure),
        (name, NAMES, LoginStatus::AuthorizationFailure),
        (moved, NAMES, LoginStatus::MovedTemporarily),
        (
            |target| target.offline = true,
            NAMES,
            LoginStatus::ServiceUnavailable,
        ),
    ];
    for (change, text, expected) in cases {
        let mut login = login(catalog(change));
        let outputs = send(&mut login, 0x87, text);
        assert_eq!(refused(&outputs).0, expected, "{text}");
        if expected == LoginStatus::MovedTemporarily {
            let Output::Send(_, text) = &outputs[0] else {
                panic!("an answer");
            };
            assert_eq!(&text[..], b"TargetAddress=10.0.0.2:3260\0");
        }
    }
}

#[test]
fn repeated_names_are_taken_if_they_say_the_same() {
    let mut login = login(catalog(|_| {}));
    answer(&send(&mut login, 0x04, NAMES));
    established(send(&mut login, 0x87, NAMES));
}

#[test]
fn wrong_stage_bits() {
    // CSG 2, CSG 3, T with NSG 0, 2, CSG = NSG, C and T together.
    for flags in [0x08, 0x8f, 0x84, 0x86, 0x85, 0xc7] {
        let mut login = login(catalog(|_| {}));
        let (status, _) = refused(&send(&mut login, flags, NAMES));
        assert_eq!(status, LoginStatus::InitiatorError, "{flags:#x}");
    }
    // Back to the security stage.
    let mut login = login(catalog(|_| {}));
    answer(&send(&mut login, 0x04, NAMES));
    let (status, _) = refused(&send(&mut login, 0x00, ""));
    assert_eq!(status, LoginStatus::InitiatorError);
}

#[test]
fn version_and_changed_ids() {
    let mut one = login(catalog(|_| {}));
    let mut versioned = request(0x87);
    versioned.version_min = 1;
    one.handle_pdu(&pdu_of(&Request::Login(versioned), b""));
    let outputs: Vec<_> = std::iter::from_fn(|| one.poll_output()).collect();
    assert_eq!(refused(&outputs).0, LoginStatus::UnsupportedVersion);

    let mut two = login(catalog(|_| {}));
    answer(&send(&mut two, 0x04, NAMES));
    let mut changed = request(0x87);
    changed.cid = 9;
    two.handle_pdu(&pdu_of(&Request::Login(changed), b""));
    let outputs: Vec<_> = std::iter::from_fn(|| two.poll_output()).collect();
    assert_eq!(refused(&outputs).0, LoginStatus::InitiatorError);
}

#[test]
fn anything_but_a_login_first_is_closed_without_an_answer() {
    let mut login = login(catalog(|_| {}));
    let mut bhs = [0; 48];
    bhs[0] = 0x1f;
    login.handle_pdu(&Pdu {
        bhs,
        ahs: Bytes::new(),
        data: Bytes::new(),
        data_is_intact: true,
    });
    assert!(matches!(
        login.poll_output(),
        Some(Output::Close(Refusal::NotLogin(0x1f)))
    ));
    assert!(login.is_over());
}

#[test]
fn too_much_text_and_too_many_requests() {
    let mut one = login(catalog(|_| {}));
    let mut outputs = Vec::new();
    for _ in 0..=TEXT_BYTES_MAX / 8000 {
        outputs = send_raw(&mut one, 0x44, &[b'x'; 8000]);
    }
    assert_eq!(refused(&outputs).0, LoginStatus::InitiatorError);

    let mut two = login(catalog(|_| {}));
    answer(&send(&mut two, 0x04, NAMES));
    for _ in 1..REQUESTS_MAX {
        answer(&send(&mut two, 0x04, ""));
    }
    assert_eq!(
        refused(&send(&mut two, 0x04, "")).0,
        LoginStatus::InitiatorError
    );
}

#[test]
fn long_answers_are_sent_in_parts() {
    let mut login = login(catalog(|_| {}));
    let unknown: Vec<String> = (0..700).map(|it| format!("X-key-number-{it}=1")).collect();
    let text = format!("{NAMES} {}", unknown.join(" "));
    let mut said = String::new();
    let mut outputs = send(&mut login, 0x87, &text);
    loop {
        match &outputs[0] {
            Output::Establish(_) => break,
            Output::Send(bhs, text) => {
                assert_eq!(bhs[1], 0x44);
                assert!(text.len() <= DEFAULT_DATA_BYTES);
                said += str::from_utf8(text).unwrap();
            }
            other => panic!("{other:?}"),
        }
        outputs = send_raw(&mut login, 0x87, b"");
    }
    login.accept(1, 1, 1);
    if let Some(Output::Send(_, text)) = login.poll_output() {
        said += str::from_utf8(&text).unwrap();
    }
    assert_eq!(said.matches("=NotUnderstood\0").count(), 700);
}

#[test]
fn operational_keys_are_not_allowed_in_the_security_stage() {
    let mut login = login(catalog(|_| {}));
    let (status, _) = refused(&send(&mut login, 0x00, &format!("{NAMES} InitialR2T=No")));
    assert_eq!(status, LoginStatus::InitiatorError);
}

#[test]
fn the_session_may_refuse() {
    let mut login = login(catalog(|_| {}));
    established(send(&mut login, 0x87, NAMES));
    login.refuse(SessionRefusal::DoesNotExist);
    let outputs: Vec<_> = std::iter::from_fn(|| login.poll_output()).collect();
    assert_eq!(refused(&outputs).0, LoginStatus::SessionDoesNotExist);
}

proptest! {
    #[test]
    fn any_requests_are_answered_or_end_it(
        requests in proptest::collection::vec(
            (any::<u8>(), proptest::collection::vec(any::<u8>(), 0..80), any::<bool>()), 1..12),
        chap in any::<bool>(),
    ) {
        let mut login = login(catalog(|target| if chap { with_chap(target) }));
        let words = ["InitiatorName=iqn.a", NAMES, "AuthMethod=CHAP,None", "CHAP_A=5,7",
            "CHAP_N=iscsi_pss CHAP_R=0x00", "CHAP_I=1 CHAP_C=0x01", "SessionType=Discovery",
            "InitialR2T=No", "FirstBurstLength=7", "X-a=b"];
        for (flags, junk, sane) in requests {
            let data = match sane {
                true => words[usize::from(flags) % words.len()].replace(' ', "\0").into_bytes(),
                false => junk,
            };
            let outputs = send_raw(&mut login, flags, &data);
            prop_assert!(!outputs.is_empty() || login.is_over());
            if outputs.iter().any(|it| matches!(it, Output::Establish(_))) {
                prop_assert!(!chap || data.windows(9).all(|it| it != b"Discovery"));
                login.accept(1, 1, 1);
            }
        }
    }
}
