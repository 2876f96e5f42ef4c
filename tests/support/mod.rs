pub(crate) mod radosgw;
pub(crate) mod s3_server;
