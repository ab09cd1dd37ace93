//! A small iSCSI initiator: one session of one connection, blocking, without digests or CHAP. For what libiscsi's
//! tools do not show, such as the unit attention of a certain command.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// No task.
const NO_TAG: u32 = u32::MAX;
/// Most data of a write: what may be sent with the command whatever is negotiated (RFC 7143 §13.12, §13.14).
const OUT_BYTES_MAX: usize = 8192;

/// A task management function (RFC 7143 §11.5.1).
#[derive(Clone, Copy, Debug)]
pub enum Reset {
    /// LOGICAL UNIT RESET.
    Unit = 5,
    /// TARGET WARM RESET.
    Warm = 6,
    /// TARGET COLD RESET.
    Cold = 7,
}

/// How a command ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ended {
    /// SCSI status.
    pub status: u8,
    /// Sense key, and additional sense code with its qualifier.
    pub sense: Option<(u8, u16)>,
    /// Data-in.
    pub data: Vec<u8>,
}

/// A session with LUN 1 of a target.
pub struct IscsiClient {
    stream: TcpStream,
    cmd_sn: u32,
    exp_stat_sn: u32,
    next_itt: u32,
}

/// Basic header segment.
pub type Bhs = [u8; 48];

/// Sets a field of four bytes.
pub fn put(bhs: &mut Bhs, at: usize, value: u32) {
    bhs[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// A field of four bytes.
pub fn word(bhs: &Bhs, at: usize) -> u32 {
    u32::from_be_bytes([bhs[at], bhs[at + 1], bhs[at + 2], bhs[at + 3]])
}

fn odd(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, what.into())
}

impl IscsiClient {
    /// Logs in; `patience` is for every answer. `number` tells the sessions of one initiator apart.
    ///
    /// # Errors
    /// If the target is not reached, or refuses.
    pub fn login(
        portal: SocketAddr,
        target: &str,
        number: u16,
        patience: Duration,
    ) -> Result<IscsiClient> {
        IscsiClient::login_with(portal, target, number, "", patience)
    }

    /// Logs in with keys of its own, each ended by a NUL.
    ///
    /// # Errors
    /// As [`IscsiClient::login`].
    pub fn login_with(
        portal: SocketAddr,
        target: &str,
        number: u16,
        keys: &str,
        patience: Duration,
    ) -> Result<IscsiClient> {
        let stream = TcpStream::connect_timeout(&portal, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_nodelay(true)?;
        let mut client = IscsiClient {
            stream,
            cmd_sn: 1,
            exp_stat_sn: 0,
            next_itt: 1,
        };
        let mut bhs = [0; 48];
        // Immediate; transit from operational negotiation to the full feature phase (§11.12).
        bhs[0] = 0x43;
        bhs[1] = 0x87;
        bhs[8..12].copy_from_slice(&[0x80, 0, 0, 0]);
        bhs[12..14].copy_from_slice(&number.to_be_bytes());
        put(&mut bhs, 24, client.cmd_sn);
        let text = format!("InitiatorName=iqn.2026-01.test:client\0TargetName={target}\0{keys}");
        client.send(bhs, text.as_bytes())?;
        let (answer, _) = client.receive()?;
        match (answer[0] & 0x3f, answer[36], answer[37]) {
            (0x23, 0, 0) => Ok(client),
            (_, class, detail) => Err(odd(format!("login refused: {class:02x}{detail:02x}"))),
        }
    }

    /// Sends a header, with the length of its data and ExpStatSN set right, and the data.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn send(&mut self, mut bhs: Bhs, data: &[u8]) -> Result<()> {
        put(&mut bhs, 28, self.exp_stat_sn);
        bhs[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        let mut bytes = bhs.to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        self.stream.write_all(&bytes)
    }

    /// The next PDU, whatever it is.
    ///
    /// # Errors
    /// If the connection has ended, or there is none in time.
    pub fn receive(&mut self) -> Result<(Bhs, Vec<u8>)> {
        let mut bhs = [0; 48];
        self.stream.read_exact(&mut bhs)?;
        let length = (word(&bhs, 4) & 0xff_ffff) as usize;
        let mut data = vec![0; length.next_multiple_of(4)];
        self.stream.read_exact(&mut data)?;
        data.truncate(length);
        // NOP-In as a probe, R2T and Data-In without status carry no StatSN of their own.
        let carries = match bhs[0] & 0x3f {
            0x20 => word(&bhs, 16) != NO_TAG,
            0x31 => false,
            0x25 => bhs[1] & 1 != 0,
            _ => true,
        };
        if carries {
            self.exp_stat_sn = word(&bhs, 24).wrapping_add(1);
        }
        Ok((bhs, data))
    }

    /// A request for logical unit 1 with the next CmdSN and a new tag, and that tag.
    pub fn request(&mut self, opcode: u8, flags: u8) -> (Bhs, u32) {
        let mut bhs = [0; 48];
        (bhs[0], bhs[1], bhs[9]) = (opcode, flags, 1);
        let itt = self.next_itt;
        self.next_itt += 1;
        put(&mut bhs, 16, itt);
        put(&mut bhs, 24, self.cmd_sn);
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        (bhs, itt)
    }

    /// The next PDU about a task; probes are answered.
    fn next_of(&mut self, itt: u32) -> Result<(Bhs, Vec<u8>)> {
        loop {
            let (bhs, data) = self.receive()?;
            match bhs[0] & 0x3f {
                0x20 if word(&bhs, 20) != NO_TAG => {
                    let mut pong = [0; 48];
                    (pong[0], pong[1]) = (0x40, 0x80);
                    pong[8..16].copy_from_slice(&bhs[8..16]);
                    put(&mut pong, 16, NO_TAG);
                    pong[20..24].copy_from_slice(&bhs[20..24]);
                    put(&mut pong, 24, self.cmd_sn);
                    self.send(pong, &[])?;
                }
                0x3f => return Err(odd("a PDU was rejected")),
                0x32 => return Err(odd(format!("asynchronous event {}", bhs[36]))),
                _ if word(&bhs, 16) == itt => return Ok((bhs, data)),
                _ => {}
            }
        }
    }

    /// Has a command carried out.
    ///
    /// # Errors
    /// If the session ends, or there is no answer in time.
    ///
    /// # Panics
    /// If `out` is longer than what can be sent with a command.
    pub fn command(&mut self, cdb: &[u8], reads: u32, out: &[u8]) -> Result<Ended> {
        assert!(out.len() <= OUT_BYTES_MAX, "it goes with the command");
        let direction = u8::from(reads > 0) << 6 | u8::from(!out.is_empty()) << 5;
        let (mut bhs, itt) = self.request(0x01, 0x81 | direction);
        put(&mut bhs, 20, reads.max(out.len() as u32));
        bhs[32..32 + cdb.len()].copy_from_slice(cdb);
        self.send(bhs, out)?;
        let mut data_in = Vec::new();
        loop {
            let (bhs, data) = self.next_of(itt)?;
            match bhs[0] & 0x3f {
                0x25 => {
                    data_in.extend(data);
                    if bhs[1] & 1 != 0 {
                        return Ok(Ended {
                            status: bhs[3],
                            sense: None,
                            data: data_in,
                        });
                    }
                }
                0x21 => {
                    // Its length comes first (§11.4.7.2); fixed format (SPC-4 §4.5.3).
                    let sense = data.get(2..16).filter(|sense| sense[0] & 0x7f == 0x70);
                    return Ok(Ended {
                        status: bhs[3],
                        sense: sense.map(|it| (it[2], u16::from_be_bytes([it[12], it[13]]))),
                        data: data_in,
                    });
                }
                other => return Err(odd(format!("opcode {other:#x}"))),
            }
        }
    }

    /// Answers probes until the session ends.
    ///
    /// # Errors
    /// Why it ended.
    pub fn idle(&mut self) -> Result<()> {
        // No task has this tag.
        self.next_of(0).map(|_| ())
    }

    /// TEST UNIT READY.
    ///
    /// # Errors
    /// As [`IscsiClient::command`].
    pub fn test_unit_ready(&mut self) -> Result<Ended> {
        self.command(&[0; 6], 0, &[])
    }

    /// TEST UNIT READY until nothing is to be told any more.
    ///
    /// # Errors
    /// As [`IscsiClient::command`]; also if the unit does not become ready.
    pub fn ready(&mut self) -> Result<()> {
        for _ in 0..16 {
            let ended = self.test_unit_ready()?;
            match ended.sense {
                None if ended.status == 0 => return Ok(()),
                Some((6, _)) => {}
                _ => return Err(odd(format!("not ready: {ended:?}"))),
            }
        }
        Err(odd("unit attentions without end"))
    }

    /// A reset; gives the response code (§11.6.1), 0 for "complete".
    ///
    /// # Errors
    /// As [`IscsiClient::command`].
    pub fn reset(&mut self, which: Reset) -> Result<u8> {
        let (mut bhs, itt) = self.request(0x02, 0x80 | which as u8);
        put(&mut bhs, 20, NO_TAG);
        self.send(bhs, &[])?;
        let (answer, _) = self.next_of(itt)?;
        match answer[0] & 0x3f {
            0x22 => Ok(answer[2]),
            other => Err(odd(format!("opcode {other:#x}"))),
        }
    }
}

/// A 10-byte CDB with an LBA and a number of blocks.
pub fn cdb10(opcode: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = opcode;
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}
